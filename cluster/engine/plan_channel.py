"""Step plans from the leader to the other ranks: length-prefixed messages on stream sockets.

A rank that waits for its next plan sleeps in ``recv``: an idle replica costs no CPU. Closing the leader's end is how
the others learn that it is gone.
"""

from __future__ import annotations

import socket
import struct
import threading

from cluster.domain.clock import Clock
from cluster.domain.errors import EngineFailed
from cluster.engine.step import SequenceKey, StepEntry, StepPlan
from cluster.v1 import engine_pb2

_LENGTH = struct.Struct("!I")
_HELLO = struct.Struct("!QI")  # generation, rank
_CONNECT_PAUSE_S = 0.05
_SEND_TIMEOUT_S = 30.0
_HELLO_TIMEOUT_S = 2.0  # a stranger that says nothing does not hold up the ranks
MAX_PLAN_BYTES = 64 * 2**20


def encode_plan(plan: StepPlan) -> bytes:
    """``plan`` without its sequences' names, which only the leader needs."""
    return _frame(
        engine_pb2.StepPlan(
            step=plan.step,
            entries=[
                engine_pb2.StepEntry(token_ids=e.token_ids, start=e.start, block_ids=e.block_ids, sample=e.sample)
                for e in plan.entries
            ],
        )
    )


def ready_signal() -> bytes:
    """Tells the ranks that the warm-up is over."""
    return _frame(engine_pb2.StepPlan(ready=True))


def entries_of(message: engine_pb2.StepPlan) -> tuple[StepEntry, ...]:
    """The entries to run, as a rank sees them."""
    return tuple(
        StepEntry(SequenceKey(0, i), tuple(e.token_ids), e.start, tuple(e.block_ids), e.sample)
        for i, e in enumerate(message.entries)
    )


class PlanSender:
    """The leader's end: one connection to every other rank. Not thread-safe; the compute thread owns it."""

    def __init__(self, host: str, port: int, generation: int) -> None:
        self._listener = socket.create_server((host, port))
        self._generation = generation
        self._peers: dict[int, socket.socket] = {}

    def accept(self, ranks: int, deadline_s: float, clock: Clock) -> None:
        """Waits for ranks 1 .. ``ranks`` - 1; EngineFailed names those that did not come in time."""
        deadline = clock.now() + deadline_s
        while len(self._peers) < ranks - 1:
            self._listener.settimeout(max(0.001, deadline - clock.now()))
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, ranks)) - set(self._peers))
                raise EngineFailed(f"Ranks {missing} did not join within {deadline_s:.0f} s.", retryable=True) from None
            self._admit(peer, ranks)

    def _admit(self, peer: socket.socket, ranks: int) -> None:
        """Keeps ``peer`` when it is a rank of this generation that is still missing."""
        peer.settimeout(_HELLO_TIMEOUT_S)
        try:
            generation, rank = _HELLO.unpack(_receive(peer, _HELLO.size))
        except (OSError, EngineFailed):
            peer.close()
            return
        if generation != self._generation or not 0 < rank < ranks or rank in self._peers:
            peer.close()
            return
        peer.settimeout(_SEND_TIMEOUT_S)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[rank] = peer

    def send(self, frame: bytes) -> None:
        """To every rank; EngineFailed when one is gone."""
        for rank, peer in self._peers.items():
            try:
                peer.sendall(frame)
            except OSError as error:
                raise EngineFailed(f"Rank {rank} no longer takes plans: {error}", retryable=True) from error

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._listener.close()


class PlanReceiver:
    """Another rank's end."""

    def __init__(self, host: str, port: int, generation: int, rank: int) -> None:
        self._address, self._hello = (host, port), _HELLO.pack(generation, rank)
        self._socket: socket.socket | None = None

    def connect(self, deadline_s: float, clock: Clock) -> None:
        """Tries until the leader listens, at most ``deadline_s``."""
        deadline, pause = clock.now() + deadline_s, threading.Event()
        while True:
            try:
                self._socket = socket.create_connection(self._address, timeout=max(0.1, deadline - clock.now()))
                break
            except OSError as error:
                if clock.now() >= deadline:
                    raise EngineFailed(
                        f"The leader at {self._address} does not listen: {error}", retryable=True
                    ) from error
                pause.wait(_CONNECT_PAUSE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(self._hello)
        self._socket.settimeout(None)  # an idle engine sends nothing for as long as it likes

    def receive(self) -> engine_pb2.StepPlan:
        """The next plan; EngineFailed when the leader is gone."""
        assert self._socket is not None
        (length,) = _LENGTH.unpack(_receive(self._socket, _LENGTH.size))
        if length > MAX_PLAN_BYTES:
            raise EngineFailed(f"A plan of {length} bytes is no plan.", retryable=False)
        return engine_pb2.StepPlan.FromString(_receive(self._socket, length))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _frame(message: engine_pb2.StepPlan) -> bytes:
    payload = message.SerializeToString()
    return _LENGTH.pack(len(payload)) + payload


def _receive(peer: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = peer.recv(count - len(parts))
        if not part:
            raise EngineFailed("The other end of the plan channel is gone.", retryable=True)
        parts += part
    return bytes(parts)
