"""Adapter: a process that the controller should know about holds a stream to it, for as long as it lives."""

from __future__ import annotations

import threading
from contextlib import suppress

import grpc

from cluster.v1 import control_pb2, control_pb2_grpc
from cluster.wire.channel import open_sync_channel

RETRY_S = 5.0
CLOSE_DEADLINE_S = 5.0


class Presence:
    """From ``__init__`` to ``close``, in a thread of its own.

    A controller that is away is asked again after ``retry_s``.
    """

    def __init__(self, controller: str, process: control_pb2.ProcessStatus, retry_s: float = RETRY_S) -> None:
        self._process, self._retry_s = process, retry_s
        self._ended = threading.Event()
        self._channel = open_sync_channel(controller)
        self._thread = threading.Thread(target=self._attend, name="presence", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._channel.close()  # ends the stream
        self._thread.join(timeout=CLOSE_DEADLINE_S)

    def _attend(self) -> None:
        attend = control_pb2_grpc.ControlStub(self._channel).Attend
        while not self._ended.is_set():
            with suppress(grpc.RpcError, ValueError):  # it is away; the channel was closed
                for _ in attend(self._process):
                    continue
            if self._ended.wait(self._retry_s):
                return
