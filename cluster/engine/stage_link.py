"""Hidden states between pipeline stages: tensor rank i of a stage to tensor rank i of the next, on a stream socket.

A frame is a header (step, rows, columns, element type) and the rows as they lie in memory. They are received into
one buffer that was made for the largest step, so that nothing is copied on the way on a CPU.

Sending never waits for the receiver: what the kernel takes at once (a decode's rows, as a rule) leaves from the compute
thread, the rest from a thread of its own, so that the next plan is computed while a long prompt's rows travel. What
is queued is bounded by the plans outstanding: the leader dispatches no further one before the oldest is collected.

On CUDA the rows pass through pinned host memory, and the sending thread waits for the copy. That path has not been
run: no GPU was at hand.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from cluster.domain.clock import Clock
from cluster.domain.errors import EngineFailed
from cluster.engine.rank_socket import (
    FrameSender,
    Hello,
    accept_ranks,
    hang_up,
    join_rank,
    receive_exactly,
    receive_into,
)

CHANNEL = b"hide"
_HEADER = struct.Struct("!QIIB")  # step, rows, columns, element type
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class StageSender(Protocol):
    """Towards the next stage."""

    def send(self, step: int, hidden: torch.Tensor) -> None:
        """Hands ``hidden`` ``[tokens, hidden_size]`` over: nobody may write to it afterwards. EngineFailed."""
        ...


class StageReceiver(Protocol):
    """From the stage before."""

    def receive(self, step: int, num_tokens: int) -> torch.Tensor:
        """``[num_tokens, hidden_size]`` of ``step``, valid until the next call. EngineFailed."""
        ...


@dataclass(frozen=True, slots=True)
class HiddenShape:
    """The largest rows that travel: ``max_rows`` tokens of one step, ``columns`` values each."""

    max_rows: int
    columns: int
    dtype: torch.dtype


class SocketStageSender:
    """One connection to the next stage. ``failed`` is told when the sending thread cannot send."""

    def __init__(self, peer: socket.socket, failed: Callable[[str], None]) -> None:
        self._frames = FrameSender(peer, "The next stage", failed)

    @classmethod
    def connect(
        cls, address: tuple[str, int], hello: Hello, deadline_s: float, clock: Clock, failed: Callable[[str], None]
    ) -> SocketStageSender:
        """To the next stage's tensor rank; EngineFailed when nobody listens there within ``deadline_s``."""
        return cls(join_rank(address, hello, deadline_s, clock), failed)

    @property
    def socket(self) -> socket.socket:
        return self._frames.socket

    def send(self, step: int, hidden: torch.Tensor) -> None:
        rows, columns = hidden.shape
        header = _HEADER.pack(step, rows, columns, _DTYPES.index(hidden.dtype))
        if hidden.device.type == "cpu":
            self._frames.send(header, _bytes_of(hidden.contiguous()))
        else:
            self._frames.send_later(header, lambda: _bytes_of(_on_host(hidden)))

    def close(self) -> None:
        self._frames.close()


class SocketStageReceiver:
    """Listens for the one tensor rank of the stage before, and receives into one buffer."""

    def __init__(self, host: str, port: int, shape: HiddenShape, device: torch.device) -> None:
        self._listener = socket.create_server((host, port))
        self._shape, self._device = shape, device
        size = shape.max_rows * shape.columns * shape.dtype.itemsize
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._bytes = self._buffer.numpy().data
        self._socket: socket.socket | None = None

    def accept(self, hello: Hello, deadline_s: float, clock: Clock) -> None:
        """Waits for the rank that ``hello`` names; EngineFailed after ``deadline_s``."""
        self._socket = accept_ranks(self._listener, [hello], deadline_s, clock)[hello.rank]

    @property
    def socket(self) -> socket.socket:
        assert self._socket is not None, "accept first"
        return self._socket

    def receive(self, step: int, num_tokens: int) -> torch.Tensor:
        shape, peer = self._shape, self.socket
        header = _HEADER.unpack(receive_exactly(peer, _HEADER.size, "The stage before"))
        expected = (step, num_tokens, shape.columns, _DTYPES.index(shape.dtype))
        if header != expected:
            raise EngineFailed(f"The stage before sent {header} instead of {expected}.", retryable=True)
        assert num_tokens <= shape.max_rows, (num_tokens, shape.max_rows)
        size = num_tokens * shape.columns * shape.dtype.itemsize
        receive_into(peer, self._bytes[:size], "The stage before")
        rows = self._buffer[:size].view(shape.dtype).view(num_tokens, shape.columns)
        return rows if self._device.type == "cpu" else rows.to(self._device)

    def close(self) -> None:
        self._listener.close()
        if self._socket is not None:
            hang_up(self._socket)


def _on_host(hidden: torch.Tensor) -> torch.Tensor:
    staged = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
    return staged.copy_(hidden)  # waits for the kernels that make it


def _bytes_of(hidden: torch.Tensor) -> memoryview:
    """The tensor's memory; numpy knows no bfloat16."""
    return hidden.reshape(-1).view(torch.uint8).numpy().data
