"""One sequence's way back from an engine: filled by the session's reader, emptied by its request."""

from __future__ import annotations

import asyncio
import enum

from cluster.v1 import engine_pb2


class LossReason(enum.StrEnum):
    """Why a sequence lost its engine: the label of cluster_router_failovers_total."""

    BROKEN = "broken"  # the stream ended or failed
    SILENT = "silent"  # no message for engine_silence_s
    STUCK = "stuck"  # one step has run for engine_step_deadline_s
    REMOVED = "removed"  # the controller took the endpoint out of the table
    DROPPED = "dropped"  # the engine ended it without being asked
    OVERFLOW = "overflow"  # more updates than the request can have


class SequenceLost(Exception):  # noqa: N818 - an event of the router's inside, not a fault of a caller
    """The engine will say no more about this sequence; another one may continue it."""

    def __init__(self, reason: LossReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class SequenceStream:
    """Updates in order, without anybody waiting for a slow client.

    Bounded by ``updates_max``, which is one more than the tokens the request may still get: an engine that
    sends more breaks its contract. What was delivered before a failure is handed out before it is raised.
    """

    __slots__ = ("_failure", "_updates", "_updates_max", "_waiter", "ended")

    def __init__(self, updates_max: int) -> None:
        self._updates: list[engine_pb2.SequenceUpdate] = []
        self._updates_max = updates_max
        self._waiter: asyncio.Future[None] | None = None
        self._failure: Exception | None = None
        self.ended = False  # the engine has said its last word

    def deliver(self, update: engine_pb2.SequenceUpdate) -> None:
        if update.end:
            self.ended = True
        if self._failure is not None:
            return  # after an update that was refused, the next one would leave a gap
        if len(self._updates) >= self._updates_max:
            self.fail(SequenceLost(LossReason.OVERFLOW))
            return
        self._updates.append(update)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Nothing more will come; the first failure counts."""
        if self._failure is None:
            self._failure = error
            self._wake()

    async def receive(self) -> list[engine_pb2.SequenceUpdate]:
        """Everything delivered since the last call, at least one update; or raises what ``fail`` was told."""
        while not self._updates:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        updates, self._updates = self._updates, []
        return updates

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
