"""What a replica tells of its blocks: the log, and readers at their own pace."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.domain.block_hash import block_hashes, short_name
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.engine import block_events
from cluster.engine.block_events import BlockLog, RecentBlocks
from cluster.engine.block_pool import BlockPool
from cluster.engine.step import SequenceKey
from cluster.router.prefix_index import PrefixIndex
from tests.unit.engine.small_engine import Engine


def name(number: int) -> bytes:
    return number.to_bytes(8, "little") + bytes(24)


def changes(stored=(), removed=()):
    return {name(n): True for n in stored} | {name(n): False for n in removed}


def drained(reader):
    messages = []
    while (message := reader.next()) is not None:
        messages.append(message)
    return messages


class Router:
    """Follows a reader by the contract of BlockEvents alone."""

    def __init__(self, reader):
        self.reader, self.known, self.number, self.whole, self.resets = reader, set(), 0, False, 0

    def hear(self, message):
        self.number += 1
        assert message.sequence_number == self.number
        assert len(message.stored) + len(message.removed) <= block_events.MAX_NAMES
        assert not set(message.stored) & set(message.removed)
        if message.reset:
            self.known, self.whole = set(), False
            self.resets += 1
        self.known |= set(message.stored)
        self.known -= set(message.removed)
        self.whole |= message.complete

    def hear_all(self):
        for message in drained(self.reader):
            self.hear(message)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(block_events, "MAX_NAMES", 4)


def test_a_pool_tells_what_it_names_and_evicts():
    recent = RecentBlocks()
    pool = BlockPool(3, 2, recent)
    assert recent.take() is None
    first, second, third = block_hashes(range(6), 2)
    blocks = pool.allocate(2)
    for block, block_name in zip(blocks, (first, second), strict=True):
        pool.put_name(block, block_name)
    assert recent.take() == {first: True, second: True}
    assert recent.take() is None
    pool.free(blocks)
    pool.put_name(pool.allocate(1)[0], third)
    pool.allocate(1)
    assert recent.take() == {third: True, second: False}, "the last block of a sequence is the first to go"


def test_a_session_begins_with_the_whole_account_in_small_messages(small):
    log = BlockLog()
    log.append(changes(range(10)))
    messages = drained(log.open())
    assert [(m.reset, list(m.stored), m.complete) for m in messages] == [
        (True, [0, 1, 2, 3], False), (False, [4, 5, 6, 7], False), (False, [8, 9], True),
    ]  # fmt: skip
    assert [m.sequence_number for m in messages] == [1, 2, 3]


def test_an_empty_account_is_told_too():
    reader = BlockLog().open()
    (message,) = drained(reader)
    assert (message.reset, message.complete, list(message.stored)) == (True, True, [])
    assert not reader.behind


def test_changes_while_the_account_is_told_come_after_it(small):
    log = BlockLog()
    log.append(changes(range(6)))
    router = Router(log.open())
    router.hear(router.reader.next())
    log.append(changes([20], removed=[1, 5]))
    router.hear(router.reader.next())
    assert router.known == {0, 1, 2, 3, 4, 5}
    router.hear_all()
    assert router.known == {0, 2, 3, 4, 20}
    assert router.resets == 1


def test_what_changed_several_times_is_told_as_it_is_now():
    log = BlockLog()
    reader = log.open()
    drained(reader)
    log.append(changes([1, 2]))
    log.append(changes([3], removed=[1]))
    log.append(changes([1], removed=[2]))
    (message,) = drained(reader)
    assert (sorted(message.stored), list(message.removed)) == ([1, 3], [2])


def test_who_falls_behind_the_log_gets_a_full_account(small):
    log = BlockLog(max_logged=8)
    slow, quick = Router(log.open()), Router(log.open())
    for number in range(30):
        log.append(changes([number], removed=[number - 3] if number >= 3 else ()))
        quick.hear_all()
        if number % 15 == 14:
            slow.hear_all()
    slow.hear_all()
    assert slow.known == quick.known == {27, 28, 29}
    assert (slow.resets, quick.resets) == (2, 1)


def test_the_log_keeps_nothing_for_nobody_and_little_for_the_slow(small):
    log = BlockLog(max_logged=8)
    for number in range(3, 100):
        log.append(changes([number], removed=[number - 3]))
    assert (log.first, log.end) == (0, 0)
    reader = log.open()
    for number in range(100, 200):
        log.append(changes([number], removed=[number - 3]))
    assert log.end - log.first <= 8
    reader.close()
    assert (log.has_readers, log.end - log.first) == (False, 0)
    late = Router(log.open())
    late.hear_all()
    assert late.known == {197, 198, 199}


def test_a_restarted_reader_tells_everything_again(small):
    log = BlockLog()
    log.append(changes(range(9)))
    router = Router(log.open())
    router.hear(router.reader.next())
    router.reader.restart()
    router.hear_all()
    assert router.known == set(range(9))
    assert (router.resets, router.whole) == (2, True)


def test_routers_know_a_block_by_the_first_bytes_of_its_name():
    log = BlockLog()
    names = block_hashes(range(64), 16, b"salt")
    log.append(dict.fromkeys(names, True))
    assert list(log.open().next().stored) == [short_name(n) for n in names]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_reader_ends_up_with_what_is_there(data):
    """Any changes, read by several at any pace, with resyncs, over a log too short for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_events, "MAX_NAMES", 3)
        log, held = BlockLog(max_logged=data.draw(st.integers(3, 20))), set()
        routers = [Router(log.open()) for _ in range(2)]
        for _ in range(data.draw(st.integers(0, 25))):
            flips = data.draw(st.lists(st.integers(0, 9), unique=True, max_size=7))
            log.append({name(n): n not in held for n in flips})
            held ^= set(flips)
            for router in routers:
                for _ in range(data.draw(st.integers(0, 3))):
                    message = router.reader.next()
                    if message is not None:
                        router.hear(message)
                if data.draw(st.integers(0, 9)) == 0:
                    router.reader.restart()
        for router in routers:
            router.hear_all()
            assert router.known == held
            assert router.whole


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_router_knows_what_the_pool_can_find_through_any_load(data):
    """Sequences that begin alike, preempted and cancelled over a small pool; two routers, one of which misses news."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_events, "MAX_NAMES", 3)
        engine, recent, log = Engine(num_blocks=8, caching=True), RecentBlocks(), BlockLog(max_logged=6)
        engine.pool._recorder = recent
        who, names = Incarnation(ReplicaId("m", 0), 1), set()
        readers = [(log.open(), PrefixIndex()) for _ in range(2)]
        for number in range(data.draw(st.integers(1, 30))):
            action = data.draw(st.sampled_from(["submit", "submit", "step", "step", "step", "cancel"]))
            if action == "submit":
                prompt, first = data.draw(st.integers(1, 14)), data.draw(st.sampled_from([10, 10, 40]))
                engine.submit(number, prompt=prompt, max_tokens=data.draw(st.integers(1, 12)), first=first)
            elif action == "cancel":
                engine.scheduler.cancel(SequenceKey(1, data.draw(st.integers(0, number))))
            elif engine.scheduler.can_schedule:
                engine.step()
            log.append(recent.take() or {})
            names |= set(engine.pool._found)
            for reader, index in readers[: data.draw(st.integers(0, 2))]:
                message = reader.next()
                lost = data.draw(st.integers(0, 9)) == 0
                if message is not None and not lost and not index.apply(who, message):
                    reader.restart()
        log.append({bytes(32): True})  # shows a router what it has missed
        for reader, index in readers:
            while (message := reader.next()) is not None:
                if not index.apply(who, message):
                    reader.restart()
            found = {n for n in names if index.holders([short_name(n)])}
            assert found == set(engine.pool._found)
            index.check()
