"""Hidden states over real sockets on loopback."""

import socket
import threading

import pytest
import torch

from cluster.domain.clock import MonotonicClock
from cluster.domain.errors import EngineFailed
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.engine.rank_socket import Hello
from cluster.engine.stage_link import CHANNEL, HiddenShape, SocketStageReceiver, SocketStageSender

CLOCK = MonotonicClock()
HELLO = Hello(CHANNEL, Incarnation(ReplicaId("m", 0), 2), 1)
CPU = torch.device("cpu")


class Link:
    def __init__(self, max_rows=64, columns=16, dtype=torch.float32):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = probe.getsockname()
        self.failures, self.failed = [], threading.Event()
        self.receiver = SocketStageReceiver(*self.address, HiddenShape(max_rows, columns, dtype), CPU)
        self.sender = SocketStageSender.connect(self.address, HELLO, 5.0, CLOCK, self.fail)
        self.receiver.accept(HELLO, 5.0, CLOCK)

    def fail(self, why):
        self.failures.append(why)
        self.failed.set()


@pytest.fixture
def make():
    links = []

    def new(**options):
        links.append(Link(**options))
        return links[-1]

    yield new
    for link in links:
        link.sender.close()
        link.receiver.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_arrive_bit_for_bit(make, dtype):
    link = make(dtype=dtype)
    for step, rows in ((1, 64), (2, 1), (3, 17)):
        hidden = torch.randn(rows, 16).to(dtype)
        link.sender.send(step, hidden)
        received = link.receiver.receive(step, rows)
        assert received.dtype == dtype
        assert torch.equal(received, hidden)


def test_rows_of_a_strided_tensor_arrive_in_order(make):
    link = make()
    hidden = torch.randn(16, 32).t()[:, :16]
    link.sender.send(1, hidden)
    assert torch.equal(link.receiver.receive(1, 32), hidden)


def test_sending_does_not_wait_and_keeps_the_order(make):
    """Far more than any socket buffer, while nobody reads; small frames behind large ones stay behind them."""
    link = make(max_rows=4096, columns=4096)
    large = [torch.full((4096, 4096), float(step)) for step in (1, 3)]
    sent = threading.Event()

    def send():
        for step, hidden in ((1, large[0]), (2, torch.full((1, 4096), 2.0)), (3, large[1])):
            link.sender.send(step, hidden)
        sent.set()

    threading.Thread(target=send).start()
    assert sent.wait(10), "send waited for the receiver"
    for step, rows in ((1, 4096), (2, 1), (3, 4096)):
        assert bool((link.receiver.receive(step, rows) == step).all())


def test_a_full_socket_is_not_waited_for(make):
    """Small frames until the kernel takes no more: from then on they are queued."""
    link, sent = make(), threading.Event()

    def send():
        for step in range(20_000):
            link.sender.send(step, torch.full((16, 16), float(step)))
        sent.set()

    threading.Thread(target=send).start()
    assert sent.wait(30), "send waited for the receiver"
    for step in range(20_000):
        assert float(link.receiver.receive(step, 16)[0, 0]) == step


def test_another_step_or_shape_is_an_error(make):
    link = make()
    link.sender.send(1, torch.zeros(3, 16))
    with pytest.raises(EngineFailed, match="instead of"):
        link.receiver.receive(2, 3)
    link = make()
    link.sender.send(1, torch.zeros(3, 16))
    with pytest.raises(EngineFailed, match="instead of"):
        link.receiver.receive(1, 4)


def test_a_stage_before_that_goes_is_an_error(make):
    link = make()
    link.sender.close()
    with pytest.raises(EngineFailed, match="The stage before is gone"):
        link.receiver.receive(1, 3)


def test_a_next_stage_that_goes_is_told_by_the_thread_that_sends(make):
    link = make(max_rows=4096, columns=4096)
    link.sender.send(1, torch.zeros(4096, 4096))
    link.receiver.close()
    assert link.failed.wait(10)
    assert "takes nothing" in link.failures[0]
    with pytest.raises(EngineFailed, match="takes nothing"):
        link.sender.send(2, torch.zeros(1, 4096))


def test_a_stranger_is_not_taken_for_the_stage_before():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    receiver = SocketStageReceiver(*address, HiddenShape(4, 4, torch.float32), CPU)
    old = Hello(CHANNEL, Incarnation(ReplicaId("m", 0), 1), 1)
    sender = SocketStageSender.connect(address, old, 5.0, CLOCK, print)
    with pytest.raises(EngineFailed, match=r"Ranks \[1\] did not join"):
        receiver.accept(HELLO, 0.2, CLOCK)
    sender.close()
