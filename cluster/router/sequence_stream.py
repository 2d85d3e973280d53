"""One sequence's way back from an engine: filled by the session's reader, emptied by its request."""

from __future__ import annotations

import asyncio
import enum

from cluster.v1 import engine_pb2, inference_pb2


class LossReason(enum.StrEnum):
    """Why a sequence lost its engine: the label of cluster_router_failovers_total."""

    BROKEN = "broken"  # the stream ended or failed
    SILENT = "silent"  # no message for engine_silence_s
    STUCK = "stuck"  # one step has run for engine_step_deadline_s
    REMOVED = "removed"  # the controller took the endpoint out of the table
    DROPPED = "dropped"  # the engine ended it without being asked
    SLOW = "slow"  # it is better off elsewhere: this engine is much slower than its peers
    OVERFLOW = "overflow"  # more updates than the request can have


class SequenceLost(Exception):  # noqa: N818 - an event of the router's inside, not a fault of a caller
    """The engine will say no more about this sequence; another one may continue it."""

    def __init__(self, reason: LossReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class News:
    """What an engine has said about one sequence since somebody last asked, as if it had said it at once.

    Tokens in plain lists, and each log-probability in a message of its own: whatever is part of a step's message keeps
    all of it in memory. ``end`` is UNSPECIFIED while it goes on.
    """

    __slots__ = ("cached_prompt_tokens", "detail", "end", "logprobs", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[inference_pb2.TokenLogprobs] = []
        self.end: engine_pb2.SequenceEnd = engine_pb2.SEQUENCE_END_UNSPECIFIED
        self.detail = ""
        self.cached_prompt_tokens = 0


class SequenceStream:
    """News of one attempt in order, without anybody waiting for a slow client, whose news grow together meanwhile.

    Bounded by ``updates_max`` updates that nobody has taken, which is more than the request may still get: an engine
    that sends more breaks its contract. What was delivered before a failure is handed out before it is raised. Updates
    of another attempt, and whatever comes after the end, are ignored.
    """

    __slots__ = ("_attempt", "_failure", "_news", "_untaken", "_updates_max", "_waiter", "ended")

    def __init__(self, updates_max: int, attempt: int) -> None:
        self._attempt = attempt
        self._updates_max = updates_max
        self._news: News | None = None
        self._untaken = 0
        self._waiter: asyncio.Future[None] | None = None
        self._failure: Exception | None = None
        self.ended = False  # the engine has said its last word

    @property
    def going_on(self) -> bool:
        """Neither ended nor failed, though its request may not have taken all of it yet."""
        return not self.ended and self._failure is None

    def deliver(self, update: engine_pb2.SequenceUpdate) -> None:
        over, end = self.ended, update.end
        if end:
            self.ended = True
        if over or self._failure is not None or update.attempt != self._attempt:
            return  # after an update that was refused, the next one would leave a gap
        self._untaken += 1
        if self._untaken > self._updates_max:
            self.fail(SequenceLost(LossReason.OVERFLOW))
            return
        news = self._news
        if news is None:
            news = self._news = News()
        news.token_ids.extend(update.token_ids)
        if update.logprobs:
            news.logprobs.extend(map(_copied, update.logprobs))
        if update.cached_prompt_tokens:
            news.cached_prompt_tokens = max(news.cached_prompt_tokens, update.cached_prompt_tokens)
        if end:
            news.end, news.detail = end, update.detail
        self._wake()

    def fail(self, error: Exception) -> None:
        """Nothing more will come; the first failure counts."""
        if self._failure is None:
            self._failure = error
            self._wake()

    async def receive(self) -> News:
        """Everything delivered since the last call, at least one update; or raises what ``fail`` was told."""
        while self._news is None:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news, self._news, self._untaken = self._news, None, 0
        return news

    def close(self) -> None:
        """Nobody receives any more; a failure that was raised is not kept alive by us."""
        self._failure, self.ended = None, True

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _copied(logprobs: inference_pb2.TokenLogprobs) -> inference_pb2.TokenLogprobs:
    copy = inference_pb2.TokenLogprobs()
    copy.CopyFrom(logprobs)
    return copy
