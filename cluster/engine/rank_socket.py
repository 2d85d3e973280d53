"""Stream sockets between the ranks of one replica: who may join, whole reads, and the word that a peer is gone.

Every connection begins with a Hello that names the channel, the incarnation and the rank: a stranger, an old
generation or a rank at the wrong door is closed without an answer. A listener is bound to the rank's own host and
closed as soon as everybody has come.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cluster.domain.clock import Clock
from cluster.domain.errors import EngineFailed
from cluster.domain.ids import Incarnation

Body = Callable[[], memoryview]

# The last resort of a wait inside a step: the controller's step_deadline_s is meant to come first.
STEP_WAIT_S = 600.0
_HELLO = struct.Struct("!4s16sQI")  # channel, digest of the incarnation, generation, rank
_HELLO_TIMEOUT_S = 2.0  # a stranger that says nothing does not hold up the ranks
_CONNECT_PAUSE_S = 0.05
# A host that vanishes without a word is noticed within about a minute, even while nothing is sent.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


@dataclass(frozen=True, slots=True)
class Hello:
    """Who knocks, and at which door. ``channel``: four letters."""

    channel: bytes
    incarnation: Incarnation
    rank: int

    def encode(self) -> bytes:
        return _HELLO.pack(self.channel, _digest(self.incarnation), self.incarnation.generation, self.rank)


def accept_ranks(
    listener: socket.socket, expected: Iterable[Hello], deadline_s: float, clock: Clock
) -> dict[int, socket.socket]:
    """The sockets of those ``expected``, by rank; closes the listener. EngineFailed names who did not come in time."""
    missing = {hello.encode(): hello.rank for hello in expected}
    joined: dict[int, socket.socket] = {}
    deadline = clock.now() + deadline_s
    with listener:
        while missing:
            listener.settimeout(max(0.001, deadline - clock.now()))
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                for peer in joined.values():
                    peer.close()
                ranks = sorted(missing.values())
                raise EngineFailed(f"Ranks {ranks} did not join within {deadline_s:.0f} s.", retryable=True) from None
            rank = missing.pop(_read_hello(peer), None)
            if rank is None:
                peer.close()
            else:
                joined[rank] = _settle(peer)
    return joined


def join_rank(address: tuple[str, int], hello: Hello, deadline_s: float, clock: Clock) -> socket.socket:
    """Knocks at ``address`` until somebody listens; EngineFailed after ``deadline_s``, or when it hangs up at once."""
    deadline, pause = clock.now() + deadline_s, threading.Event()
    while True:
        try:
            joined = socket.create_connection(address, timeout=max(0.1, deadline - clock.now()))
            break
        except OSError as error:
            if clock.now() >= deadline:
                host, port = address
                message = f"Nobody listens at {host}:{port} for rank {hello.rank}: {error}"
                raise EngineFailed(message, retryable=True) from error
            pause.wait(_CONNECT_PAUSE_S)
    try:
        _settle(joined).sendall(hello.encode())
    except OSError as error:
        joined.close()
        host, port = address
        raise EngineFailed(f"{host}:{port} hung up on rank {hello.rank}: {error}", retryable=True) from error
    return joined


def receive_into(peer: socket.socket, buffer: memoryview, who: str) -> None:
    """Fills ``buffer``; EngineFailed when ``who`` is gone or silent for longer than the socket's timeout."""
    view = buffer.cast("B")
    while view:
        try:
            count = peer.recv_into(view)
        except OSError as error:
            raise EngineFailed(f"{who} does not send: {error}", retryable=True) from error
        if not count:
            raise EngineFailed(f"{who} is gone.", retryable=True)
        view = view[count:]


def receive_exactly(peer: socket.socket, count: int, who: str) -> bytearray:
    """``count`` bytes; EngineFailed as ``receive_into``."""
    received = bytearray(count)
    receive_into(peer, memoryview(received), who)
    return received


class FrameSender:
    """Sends frames in order and never waits for the reader.

    What the kernel takes at once leaves from the calling thread, as small frames do; the rest from a thread of its
    own, which ``failed`` hears of when it cannot send: the caller may be waiting elsewhere. Whoever uses it bounds what
    can pile up. Not thread-safe.
    """

    def __init__(self, peer: socket.socket, who: str, failed: Callable[[str], None]) -> None:
        self.socket, self._who, self._failed = peer, who, failed
        self._queue: queue.SimpleQueue[tuple[bytes, Body, int]] = queue.SimpleQueue()
        self._unsent = 0  # frames in the queue or on their way; the caller adds, the thread takes away
        self._lock = threading.Lock()
        self._failure = ""
        self._thread: threading.Thread | None = None
        self._room = select.poll()
        self._room.register(peer, select.POLLOUT)

    def send(self, header: bytes, body: memoryview) -> None:
        """Hands both over: nobody may write to them afterwards. EngineFailed when the reader is gone."""
        self._check()
        sent = self._send_what_fits(header, body) if self._unsent == 0 else 0
        if sent < len(header) + body.nbytes:
            self._enqueue(header, lambda: body, sent)

    def send_later(self, header: bytes, body: Body) -> None:
        """The same for a body that has to be waited for: ``body`` is called by the sending thread."""
        self._check()
        self._enqueue(header, body, 0)

    def close(self) -> None:
        hang_up(self.socket)

    def _check(self) -> None:
        if self._failure:
            raise EngineFailed(self._failure, retryable=True)

    def _send_what_fits(self, header: bytes, body: memoryview) -> int:
        if not self._room.poll(0):  # a socket with a timeout waits for room whatever the flags of the call say
            return 0
        try:
            return self.socket.sendmsg([header, body], (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise EngineFailed(f"{self._who} takes nothing: {error}", retryable=True) from error

    def _enqueue(self, header: bytes, body: Body, sent: int) -> None:
        with self._lock:
            self._unsent += 1
        self._queue.put((header, body, sent))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rank-sender", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            header, body, sent = self._queue.get()
            try:
                self.socket.sendall(header[sent:])
                self.socket.sendall(body()[max(0, sent - len(header)) :])
            except (OSError, RuntimeError) as error:  # RuntimeError: a copy from the device that failed
                self._failure = f"{self._who} takes nothing: {error}"
                self._failed(self._failure)
                return
            with self._lock:
                self._unsent -= 1


def hang_up(peer: socket.socket) -> None:
    """Ends the connection at once; a close alone waits for whoever still polls or reads it."""
    with contextlib.suppress(OSError):  # the other end was faster
        peer.shutdown(socket.SHUT_RDWR)
    peer.close()


def watch_peers(peers: Mapping[str, socket.socket], lost: Callable[[str], None]) -> None:
    """Calls ``lost`` with the first peer that closes its end, from a thread of its own.

    It takes nothing off the sockets, and also sees the end of a peer while nobody reads, or while the compute
    thread spins in a collective that will never end.
    """
    poll = select.poll()
    names = {peer.fileno(): name for name, peer in peers.items()}
    for fileno in names:
        poll.register(fileno, select.POLLRDHUP)

    def wait() -> None:
        lost(names[poll.poll()[0][0]])

    if names:
        threading.Thread(target=wait, name="watch-peers", daemon=True).start()


def _read_hello(peer: socket.socket) -> bytes:
    peer.settimeout(_HELLO_TIMEOUT_S)
    try:
        return bytes(receive_exactly(peer, _HELLO.size, "A stranger"))
    except EngineFailed:
        return b""


def _settle(peer: socket.socket) -> socket.socket:
    peer.settimeout(STEP_WAIT_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has all three
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _digest(incarnation: Incarnation) -> bytes:
    return hashlib.sha256(str(incarnation).encode()).digest()[:16]
