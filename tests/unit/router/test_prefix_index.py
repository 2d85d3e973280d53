"""Who holds a prompt's beginning: against a plain model, and each promise by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router import prefix_index
from cluster.router.prefix_index import EXPECT_S, PrefixIndex
from cluster.v1 import engine_pb2

NAMES = st.lists(st.integers(0, 11), max_size=6, unique=True)


def endpoint(slot: int, generation: int = 1) -> Incarnation:
    return Incarnation(ReplicaId("m", slot), generation)


ENDPOINTS = [endpoint(slot) for slot in range(5)]
A, B, C = ENDPOINTS[:3]


def events(
    number: int, stored: Sequence[int] = (), removed: Sequence[int] = (), reset: bool = False
) -> engine_pb2.BlockEvents:
    return engine_pb2.BlockEvents(sequence_number=number, reset=reset, stored=stored, removed=removed)


def told(held: dict[Incarnation, Sequence[int]], max_blocks: int = 1000, **bounds: int) -> PrefixIndex:
    index = PrefixIndex(max_blocks, **bounds)
    for incarnation, names in held.items():
        assert index.apply(incarnation, events(1, names, reset=True))
    return index


def depth(names: Sequence[int], held: set[int]) -> int:
    return next((i for i, name in enumerate(names) if name not in held), len(names))


class IndexMachine(RuleBasedStateMachine):
    """Endpoints tell, lose messages, come and go; prompts are sent and asked for. The model is a set per endpoint."""

    max_blocks = 1000
    shard_names = 250

    @initialize()
    def begin(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefix_index, "_SHARD_NAMES", self.shard_names)
            self.index = PrefixIndex(self.max_blocks, max_expected=10)
        self.held: dict[Incarnation, set[int]] = {}
        self.expected: dict[Incarnation, dict[int, float]] = {}
        self.numbers = dict.fromkeys(ENDPOINTS, 0)  # of the last message an endpoint sent
        self.synced = dict.fromkeys(ENDPOINTS, False)
        self.missed = dict.fromkeys(ENDPOINTS, False)
        self.now_s = 0.0

    @rule(who=st.sampled_from(ENDPOINTS), stored=NAMES, removed=NAMES)
    def tell(self, who: Incarnation, stored: list[int], removed: list[int]) -> None:
        removed = [name for name in removed if name not in stored]
        self.numbers[who] += 1
        heard = self.index.apply(who, events(self.numbers[who], stored, removed))
        assert heard != self.missed[who], "it asks for a resync once for each gap"
        self.synced[who] &= not self.missed[who]
        self.missed[who] = False
        if self.synced[who]:
            self.held[who] |= set(stored)
            self.held[who] -= set(removed)
            for name in stored:
                self.expected.get(who, {}).pop(name, None)

    @rule(who=st.sampled_from(ENDPOINTS), stored=NAMES)
    def account(self, who: Incarnation, stored: list[int]) -> None:
        self.numbers[who] += 1
        assert self.index.apply(who, events(self.numbers[who], stored, reset=True))
        self.held[who], self.synced[who], self.missed[who] = set(stored), True, False
        self.expected.pop(who, None)

    @rule(who=st.sampled_from(ENDPOINTS))
    def lose_a_message(self, who: Incarnation) -> None:
        self.numbers[who] += 1
        self.missed[who] = True

    @rule(who=st.sampled_from(ENDPOINTS))
    def break_session(self, who: Incarnation) -> None:
        self.index.interrupted(who)
        self.numbers[who] = 0
        self.synced[who] = self.missed[who] = False

    @rule(who=st.sampled_from(ENDPOINTS))
    def forget(self, who: Incarnation) -> None:
        self.index.forget(who)
        self.held.pop(who, None)
        self.expected.pop(who, None)
        self.synced[who], self.missed[who] = False, self.numbers[who] > 0

    @rule(who=st.sampled_from(ENDPOINTS), names=NAMES, seconds=st.sampled_from([0.0, EXPECT_S / 3, EXPECT_S]))
    def send(self, who: Incarnation, names: list[int], seconds: float) -> None:
        self.now_s += seconds
        self.index.expect(who, names, self.now_s)
        for expected in self.expected.values():
            for name in [name for name, until_s in expected.items() if until_s <= self.now_s]:
                del expected[name]
        # Whether an endpoint that has just lost a message is believed is seen at its next one only.
        self.expected.setdefault(who, {}).update(dict.fromkeys(names, self.now_s + EXPECT_S))

    @rule(names=NAMES, start=st.integers(0, 9))
    def ask(self, names: list[int], start: int) -> None:
        found = self.index.holders(names)
        listed = dict(found.items())
        assert listed == {who: found.get(who) for who in ENDPOINTS if who in found}
        assert len(found) == len(listed)
        for who in ENDPOINTS:
            least = depth(names, self.held.get(who, set())) if self.max_blocks == IndexMachine.max_blocks else 0
            most = depth(names, self.held.get(who, set()) | set(self.expected.get(who, ())))
            assert least <= found.get(who, 0) <= most
        assert found.depth == max(listed.values(), default=0)
        ranked = found.longest(3, start)
        assert [d for _, d in ranked] == sorted(listed.values(), reverse=True)[:3]
        assert all(listed[who] == d for who, d in ranked)

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "index"):
            self.index.check()


class FullIndexMachine(IndexMachine):
    """The same where names must leave: what is known may then be less than what is held, never more."""

    max_blocks = 6
    shard_names = 3


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestFullIndex = FullIndexMachine.TestCase
TestFullIndex.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


@pytest.fixture(autouse=True)
def small_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_index, "_SWEEP_NAMES", 2)
    monkeypatch.setattr(prefix_index, "_SHARD_NAMES", 250)


def test_a_prompt_is_held_up_to_its_first_unknown_block() -> None:
    index = told({A: [1, 2, 3, 4], B: [1, 2], C: [2, 3]})
    found = index.holders([1, 2, 3, 9])
    assert dict(found) == {A: 3, B: 2}
    assert found.longest(5) == [(A, 3), (B, 2)]
    assert (found.depth, len(found), C in found) == (3, 2, False)
    with pytest.raises(KeyError):
        found[C]


def test_nobody_holds_nothing() -> None:
    found = told({A: [1]}).holders([])
    assert (dict(found), found.depth, found.longest(3)) == ({}, 0, [])
    assert not PrefixIndex().holders([1, 2])


def test_names_beyond_what_anybody_holds_are_not_computed() -> None:
    asked = []

    class Lazy(Sequence[int]):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, position):
            asked.append(position)
            return position

    assert told({A: [0, 1]}).holders(Lazy()).depth == 2
    assert asked == [0, 1, 2]


def test_equal_holders_take_turns_by_where_one_begins() -> None:
    index = told({who: [1, 2] for who in ENDPOINTS})
    found = index.holders([1, 2])
    firsts = [found.longest(1, start)[0][0] for start in range(10)]
    assert firsts == [*ENDPOINTS, *ENDPOINTS]
    assert {who for who, _ in found.longest(5, 3)} == set(ENDPOINTS)


def test_a_missed_message_is_noticed_once_and_the_next_account_counts() -> None:
    index = told({A: [1]})
    assert not index.apply(A, events(3, [2]))
    assert index.apply(A, events(4, [3])), "it was asked for already"
    assert (index.take_counts(), index.knows(A)) == ((0, 1), False)
    assert dict(index.holders([1, 2, 3])) == {A: 1}, "what was known serves on"
    assert index.apply(A, events(5, [1, 2], reset=True))
    assert index.apply(A, events(6, [3]))
    assert dict(index.holders([1, 2, 3])) == {A: 3}


def test_an_answer_that_is_lost_is_asked_for_again() -> None:
    index = told({A: [1]})
    assert not index.apply(A, events(3))
    assert not index.apply(A, events(5)), "message 4 may have been the account"
    assert index.apply(A, events(6))
    assert index.take_counts() == (0, 2)


def test_a_new_session_counts_from_its_first_account_even_where_numbers_fit() -> None:
    index = told({A: [1]})
    index.interrupted(A)
    assert not index.apply(A, events(2, [2])), "the first message of the new session was lost"
    assert dict(index.holders([1, 2])) == {A: 1}


def test_what_was_sent_counts_until_it_is_told_or_given_up() -> None:
    index = told({A: [1], B: []})
    index.expect(B, [1, 2, 3], now_s=10)
    assert dict(index.holders([1, 2, 3])) == {A: 1, B: 3}
    assert index.apply(B, events(2, [1, 2]))
    index.expect(A, [1], now_s=10 + EXPECT_S)
    assert dict(index.holders([1, 2, 3])) == {A: 1, B: 2}
    index.check()


def test_what_was_told_and_taken_back_is_no_longer_expected() -> None:
    index = told({A: []})
    index.expect(A, [1, 2], now_s=0)
    assert index.apply(A, events(2, [1, 2]))
    assert index.apply(A, events(3, removed=[2]))
    assert dict(index.holders([1, 2])) == {A: 1}


def test_an_old_expectation_ends_without_a_newer_one_of_the_same_block() -> None:
    index = told({A: []})
    index.expect(A, [1, 2], now_s=0)
    assert index.apply(A, events(2, [1, 2]))
    assert index.apply(A, events(3, removed=[1, 2]))
    index.expect(A, [1, 2], now_s=20)
    index.expect(A, [9], now_s=EXPECT_S)
    index.check()
    assert dict(index.holders([1, 2])) == {A: 2}, "the second prompt's time is not over"
    index.expect(A, [9], now_s=20 + EXPECT_S)
    index.check()
    assert not index.holders([1, 2])


def test_what_was_not_sent_after_all_is_not_expected() -> None:
    index = told({A: [1], B: []})
    first, second = index.expect(A, [1, 2], now_s=0), index.expect(B, [1, 2, 3], now_s=0)
    assert first is not None
    assert second is not None
    assert index.expect(A, [1, 2], now_s=1) is None, "it changes nothing"
    assert index.apply(B, events(2, [1]))
    for _ in range(2):
        index.withdraw(second)
        index.check()
        assert dict(index.holders([1, 2, 3])) == {A: 2, B: 1}
    index.forget(A)
    index.withdraw(first)
    index.check()


def test_who_tells_nothing_is_not_expected_to_hold() -> None:
    index = told({A: [1]})
    index.expect(B, [1, 2], now_s=0)
    index.interrupted(A)
    index.expect(A, [1, 2], now_s=0)
    assert dict(index.holders([1, 2])) == {A: 1}


def test_expectations_are_bounded() -> None:
    index = told({A: []}, max_expected=8)
    for prompt in range(20):
        index.expect(A, [100 * prompt + i for i in range(5)], now_s=0)
        index.check()
    assert index.holders([1900, 1901]).depth == 2, "the last ones count"
    assert not index.holders([0])
    index.expect(A, range(5000, 5050), now_s=0)
    index.check()


def test_what_no_prompt_met_for_longest_leaves_a_full_index() -> None:
    index = told({A: range(1000, 1064)}, max_blocks=64)
    for number in range(2, 200):
        assert index.holders([1000, 1001]).depth == 2
        assert index.apply(A, events(number, [number]))
        index.check()
    assert dict(index.holders([1000, 1001, 1002])) == {A: 2}
    assert index.take_counts()[0] > 100
    assert index.take_counts() == (0, 0)


def test_who_is_forgotten_is_gone_at_once_and_its_number_serves_again() -> None:
    index = told({A: range(20), B: range(10)})
    index.forget(A)
    assert dict(index.holders(range(20))) == {B: 10}
    for number in range(2, 60):
        assert index.apply(B, events(number, [500 + number]))
        index.check()
    assert len(index) == 10 + 58, "nothing of the dead is left"
    for slot in range(50):
        assert index.apply(endpoint(slot, 2), events(1, range(10), reset=True))
        index.forget(endpoint(slot, 2))
        for number in range(30):
            index.apply(B, events(60 + slot * 30 + number))
        index.check()
    assert len(index._incarnations) <= 4


def test_an_endpoint_that_resets_again_and_again_leaves_nothing_behind() -> None:
    index = told({})
    for number in range(1, 400):
        assert index.apply(A, events(number, [number], reset=True))
        index.check()
    assert dict(index.holders([399])) == {A: 1}
    assert len(index) < 20


def test_thousands_that_share_a_beginning_are_found_without_being_listed() -> None:
    many = [endpoint(slot) for slot in range(2000)]
    index = told(dict.fromkeys(many, range(20)), max_blocks=100_000)
    assert index.apply(many[77], events(2, [20, 21]))
    found = index.holders(range(25))
    assert (len(found), found.depth, found.get(many[1999])) == (2000, 22, 20)
    assert found.longest(2, 1500) == [(many[77], 22), (many[1500], 20)]
    assert list(found)[:2] == [many[77], many[0]]
