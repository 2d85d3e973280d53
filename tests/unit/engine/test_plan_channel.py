"""Step plans over real sockets on loopback."""

import socket
import threading

import pytest

from cluster.domain.clock import MonotonicClock
from cluster.domain.errors import EngineFailed
from cluster.engine.plan_channel import PlanReceiver, PlanSender, encode_plan, entries_of, ready_signal
from cluster.engine.step import SequenceKey, StepEntry, StepPlan

CLOCK = MonotonicClock()
PLAN = StepPlan(
    7,
    (
        StepEntry(SequenceKey(1, 1), (5,), 12, (3, 9), sample=True),
        StepEntry(SequenceKey(2, 1), tuple(range(300)), 0, tuple(range(75)), sample=False),
    ),
)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ends(port):
    sender = PlanSender("127.0.0.1", port, generation=4)
    receivers = [PlanReceiver("127.0.0.1", port, 4, rank) for rank in (1, 2)]
    threads = [threading.Thread(target=r.connect, args=(5.0, CLOCK)) for r in receivers]
    for thread in threads:
        thread.start()
    sender.accept(3, 5.0, CLOCK)
    for thread in threads:
        thread.join(5)
    yield sender, receivers
    sender.close()
    for receiver in receivers:
        receiver.close()


def test_every_rank_gets_the_plan_and_the_signals(ends):
    sender, receivers = ends
    for frame in (encode_plan(PLAN), ready_signal()):
        sender.send(frame)
    for receiver in receivers:
        message = receiver.receive()
        assert message.step == 7
        got = entries_of(message)
        assert [(e.token_ids, e.start, e.block_ids, e.sample) for e in got] == [
            (e.token_ids, e.start, e.block_ids, e.sample) for e in PLAN.entries
        ]
        assert receiver.receive().ready


def test_a_leader_that_goes_is_noticed(ends):
    sender, receivers = ends
    sender.close()
    with pytest.raises(EngineFailed, match="gone"):
        receivers[0].receive()


def test_missing_ranks_are_named(port):
    sender = PlanSender("127.0.0.1", port, generation=1)
    try:
        with pytest.raises(EngineFailed, match=r"Ranks \[1, 2\] did not join"):
            sender.accept(3, 0.05, CLOCK)
    finally:
        sender.close()


def test_another_generation_is_not_let_in(port):
    sender = PlanSender("127.0.0.1", port, generation=2)
    stranger = PlanReceiver("127.0.0.1", port, 1, 1)
    try:
        stranger.connect(5.0, CLOCK)
        with pytest.raises(EngineFailed, match=r"Ranks \[1\]"):
            sender.accept(2, 0.2, CLOCK)
    finally:
        stranger.close()
        sender.close()


def test_nobody_listening_is_an_error_with_a_deadline(port):
    with pytest.raises(EngineFailed, match="does not listen"):
        PlanReceiver("127.0.0.1", port, 1, 1).connect(0.1, CLOCK)
