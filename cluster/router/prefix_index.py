"""Which endpoints hold the beginning of a prompt in their prefix caches. Pure.

For each block name one integer says who holds the block: bit ``n`` stands for the endpoint with number ``n``. Walking
down a prompt is then one table look-up and one AND per block, however many endpoints share it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from cluster.domain.ids import Incarnation
from cluster.router.holders import Holders
from cluster.v1 import engine_pb2

MAX_BLOCKS = 500_000  # of one index; see docs/operating.md for the bytes
MAX_EXPECTED = 65_536  # names that were sent somewhere and are not announced yet
EXPECT_S = 30.0  # how long a prompt counts as cached where it was sent, unless it is announced
_SHARD_NAMES = 32_768  # of one dictionary: Python moves all of its entries when it grows, while nothing else goes on
_SWEEP_NAMES = 2048  # looked at in one call, while numbers of the dead wait to be used again
_DEAD_SHARE = 16  # a sweep begins when one number is dead for so many that live
_DROP_NAMES = 1024  # that leave together when the index is full


@dataclass(slots=True)
class _Account:
    """What is known of one endpoint. ``next`` is the number of the message to come; ``whole``: none was missed.

    ``expected``: names that count as held there without having been told, and since which prompt.
    """

    number: int
    bit: int
    next: int = 1
    whole: bool = False
    expected: dict[int, Expectation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Expectation:
    """Of one prompt that was sent to an endpoint: the names that nobody expected there before."""

    until_s: float
    account: _Account
    names: tuple[int, ...]


class PrefixIndex:
    """The blocks of all endpoints of one model, checkpoint and block size.

    ``apply`` takes what an endpoint tells; ``expect`` what was just sent to it and is not told yet. At most
    ``max_blocks`` names are kept; beyond that the ones that have not been met for longest leave. An endpoint that is
    forgotten is gone at once; the bits it leaves in the table are swept later, for several of the dead together, a
    part with each ``apply``, and only then its number is given to another.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS, max_expected: int = MAX_EXPECTED) -> None:
        assert max_blocks >= 1, max_blocks
        self._max_blocks, self._max_expected = max_blocks, max_expected
        shards = 1 << (-(-max_blocks // _SHARD_NAMES) - 1).bit_length()
        # name -> who holds the block, by the name's last bits; the ones not met for longest first
        self._held: tuple[dict[int, int], ...] = tuple({} for _ in range(shards))
        self._last_bits = shards - 1
        self._max_of_shard = max(1, max_blocks // shards)
        self._crowded = False  # some shard is almost full
        self._accounts: dict[Incarnation, _Account] = {}
        self._incarnations: list[Incarnation | None] = []  # by number
        self._live = 0  # the numbers in use
        self._free: list[int] = []
        self._retired = 0  # numbers of the dead that the table may still hold
        self._sweeping = 0  # those of them that the sweep under way removes
        self._unswept: list[dict[int, int]] = []  # behind the shard whose names these are
        self._to_sweep: list[int] = []
        self._expected: dict[int, int] = {}
        self._expectations: deque[Expectation] = deque()  # by time; those taken back wait for theirs without effect
        self._num_expected = 0
        self._dropped = 0
        self._resyncs = 0

    def __len__(self) -> int:
        """Names in the table."""
        return sum(map(len, self._held))

    @property
    def empty(self) -> bool:
        """Nobody tells anything."""
        return not self._live

    def knows(self, incarnation: Incarnation) -> bool:
        """Whether this endpoint tells its blocks, and none of its messages is missing."""
        account = self._accounts.get(incarnation)
        return account is not None and account.whole

    # ---- what endpoints tell

    def apply(self, incarnation: Incarnation, events: engine_pb2.BlockEvents) -> bool:
        """Takes the next message of an endpoint's session. False: messages are missing, so ask for a resync.

        It says so once for each gap; what comes before the reset is ignored.
        """
        account = self._accounts.get(incarnation)
        if events.reset:
            if account is not None:
                self._retire(account)
            account = self._open(incarnation)
            account.next, account.whole = events.sequence_number, True
        elif account is None:
            account = self._open(incarnation)
        missed, account.next = account.next != events.sequence_number, events.sequence_number + 1
        if missed or not account.whole:
            account.whole = False
            self._resyncs += missed
            return not missed
        if events.stored:
            self._store(account, events.stored)
        if events.removed:
            self._remove(account.bit, events.removed)
        if self._retired:
            self._sweep()
        return True

    def interrupted(self, incarnation: Incarnation) -> None:
        """A new session begins: whatever it tells counts from its first reset on. What is known stays until then."""
        account = self._accounts.get(incarnation)
        if account is not None:
            account.next, account.whole = 1, False

    def forget(self, incarnation: Incarnation) -> None:
        """The endpoint is gone, and all it held."""
        account = self._accounts.pop(incarnation, None)
        if account is not None:
            self._retire(account)
            self._sweep()

    # ---- what requests ask

    def holders(self, names: Sequence[int]) -> Holders:
        """Who holds how many of the leading blocks ``names``; names beyond what anybody holds are not looked at."""
        held, last_bits, expected = self._held, self._last_bits, self._expected
        bits, depth, levels = self._live, 0, []
        for name in names:
            found = held[name & last_bits].get(name, 0)
            if expected:
                found |= expected.get(name, 0)
            left = bits & found
            if left != bits:
                if depth:
                    levels.append((depth, bits ^ left))
                bits = left
                if not left:
                    break
            depth += 1
        if bits and depth:
            levels.append((depth, bits))
        levels.reverse()
        if levels and self._crowded:
            self._meet(names, levels[0][0])
        return Holders(levels, self._incarnations, self._accounts)

    def expect(self, incarnation: Incarnation, names: Sequence[int], now_s: float) -> Expectation | None:
        """A prompt with these blocks was just sent there: they count as held until told, or for EXPECT_S.

        None when that changes nothing, as with endpoints that do not tell their blocks; what it changes can be taken
        back by ``withdraw``. ``now_s`` comes from one clock and never goes back.
        """
        while self._expectations and (
            self._expectations[0].until_s <= now_s or self._num_expected > self._max_expected
        ):
            oldest = self._expectations.popleft()
            self._num_expected -= len(oldest.names)
            self.withdraw(oldest)
        account = self._accounts.get(incarnation)
        if account is None or not account.whole:
            return None
        bit, held, last_bits, expected = account.bit, self._held, self._last_bits, self._expected
        fresh = tuple(
            [
                name
                for name in islice(names, self._max_expected)
                if not (held[name & last_bits].get(name, 0) | expected.get(name, 0)) & bit
            ]
        )
        if not fresh:
            return None
        expectation = Expectation(now_s + EXPECT_S, account, fresh)
        for name in fresh:
            expected[name] = expected.get(name, 0) | bit
            account.expected[name] = expectation
        self._expectations.append(expectation)
        self._num_expected += len(fresh)
        return expectation

    def withdraw(self, expectation: Expectation) -> None:
        """What is expected because of this prompt is so no more; what was told, or of a later prompt, is left alone."""
        account = expectation.account
        for name in expectation.names:
            if account.expected.get(name) is expectation:
                del account.expected[name]
                _clear(self._expected, account.bit, name)

    # ---- the table

    def _store(self, account: _Account, names: Sequence[int]) -> None:
        held, last_bits, bit = self._held, self._last_bits, account.bit
        for name in names:
            shard = held[name & last_bits]
            mask = shard.get(name)
            if mask is None:
                shard[name] = bit  # one object for all blocks that only this endpoint holds
            elif not mask & bit:
                shard[name] = mask | bit
        if account.expected:
            for name in names:
                if account.expected.pop(name, None) is not None:
                    _clear(self._expected, bit, name)
        most = self._max_of_shard
        self._crowded = any(8 * len(shard) > 7 * most for shard in held)
        if self._crowded:
            for shard in held:
                while len(shard) > most:
                    self._drop(shard)

    def _remove(self, bit: int, names: Sequence[int]) -> None:
        held, last_bits = self._held, self._last_bits
        for name in names:
            _clear(held[name & last_bits], bit, name)

    def _meet(self, names: Sequence[int], depth: int) -> None:
        """Moves blocks that a prompt has met behind all others; what follows leaves before what it follows."""
        for name in reversed(list(islice(names, depth))):
            shard = self._held[name & self._last_bits]
            mask = shard.pop(name, None)
            if mask is not None:
                shard[name] = mask

    def _drop(self, shard: dict[int, int]) -> None:
        oldest = list(islice(shard, min(_DROP_NAMES, 1 + self._max_of_shard // 8)))
        for name in oldest:
            del shard[name]
        self._dropped += len(oldest)

    def take_counts(self) -> tuple[int, int]:
        """Names that left because the index was full, and resyncs asked for, since the last call."""
        counts, self._dropped, self._resyncs = (self._dropped, self._resyncs), 0, 0
        return counts

    def check(self) -> None:
        """Every invariant. O(names): for tests and post-mortems."""
        assert len(self) <= self._max_blocks, "the table is too large"
        assert all(name & self._last_bits == i for i, shard in enumerate(self._held) for name in shard), "misplaced"
        numbers = self._live | self._retired
        assert not self._live & self._retired, "a number is alive and dead"
        assert self._live == sum(account.bit for account in self._accounts.values()), "a number has no endpoint"
        named = sum(1 << number for number, who in enumerate(self._incarnations) if who is not None)
        assert self._live == named, "the dead have a name"
        unused = sum(1 << number for number in self._free)
        assert not numbers & unused, "a free number is in use"
        assert numbers | unused == (1 << len(self._incarnations)) - 1, "a number is lost"
        masks = [mask for shard in self._held for mask in shard.values()]
        assert all(mask and not mask & ~numbers for mask in masks), "a bit belongs to nobody"
        assert all(mask and not mask & ~self._live for mask in self._expected.values()), "the dead are expected to hold"
        told = {name: 0 for account in self._accounts.values() for name in account.expected}
        for account in self._accounts.values():
            for name in account.expected:
                told[name] |= account.bit
        assert told == self._expected, "who is expected to hold what is told in two ways"
        assert self._num_expected == sum(len(e.names) for e in self._expectations), "expectations are miscounted"
        assert self._num_expected <= 2 * self._max_expected, "too much is expected"

    # ---- numbers

    def _open(self, incarnation: Incarnation) -> _Account:
        if self._free:
            number = self._free.pop()
            self._incarnations[number] = incarnation
        else:
            number = len(self._incarnations)
            self._incarnations.append(incarnation)
        account = _Account(number, 1 << number)
        self._live |= account.bit
        self._accounts[incarnation] = account
        return account

    def _retire(self, account: _Account) -> None:
        for name in account.expected:
            _clear(self._expected, account.bit, name)
        account.expected.clear()
        self._live ^= account.bit
        self._retired |= account.bit
        self._incarnations[account.number] = None

    def _sweep(self) -> None:
        """Removes bits of the dead from a part of the table; each shard is listed once, since new names lack them."""
        if not self._sweeping:
            if _DEAD_SHARE * self._retired.bit_count() < self._live.bit_count():
                return
            self._sweeping, self._unswept = self._retired, list(self._held)
        while not self._to_sweep and self._unswept:
            self._to_sweep = list(self._unswept.pop())
        held, last_bits, dead = self._held, self._last_bits, self._sweeping
        for name in self._to_sweep[-_SWEEP_NAMES:]:
            _clear(held[name & last_bits], dead, name)
        del self._to_sweep[-_SWEEP_NAMES:]
        if self._to_sweep or self._unswept:
            return
        self._free += [number for number in range(self._sweeping.bit_length()) if self._sweeping >> number & 1]
        self._retired ^= self._sweeping
        self._sweeping = 0


def _clear(table: dict[int, int], bits: int, name: int) -> None:
    """Takes the endpoints ``bits`` away from ``name``."""
    mask = table.get(name)
    if mask is not None and mask & bits:
        mask &= ~bits
        if mask:
            table[name] = mask
        else:
            del table[name]
