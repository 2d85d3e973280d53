"""The life of one request: pick, submit, stream, fail over, end in exactly one way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

from cluster.domain.errors import (
    AbortReason,
    RejectReason,
    RequestAborted,
    RequestEvicted,
    RequestRejected,
)
from cluster.domain.ids import Incarnation
from cluster.domain.request import SequenceEnd
from cluster.router.goodput import Timing
from cluster.router.interruption import Interruption
from cluster.router.journal import Journal
from cluster.router.placing import EndpointSearch
from cluster.router.sequence_stream import LossReason, News, SequenceLost, SequenceStream
from cluster.router.session import EngineSession
from cluster.router.surroundings import Surroundings
from cluster.router.text import TextStream
from cluster.router.validation import ValidRequest
from cluster.v1 import engine_pb2, inference_pb2
from cluster.wire import convert

UPDATES_SLACK = 16  # updates of a sequence beside one for each token
COUNTED_TOGETHER = 16  # tokens of one stream; at its end whatever is left
TOKENS_TOGETHER_MAX = 1024  # of one message to a client: with all log-probabilities far below what a channel carries
REPLAYED_TOGETHER_MAX = 1024  # tokens of an earlier call turned into text before others get their turn


class Progress(NamedTuple):
    """New text and tokens of a request."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[inference_pb2.TokenLogprobs]


class Ended(NamedTuple):
    """A request that ran to its end."""

    finish_reason: inference_pb2.FinishReason
    usage: inference_pb2.Usage


Emit = Callable[[Progress], Awaitable[None]]


class RequestRun:
    """One request on its way. ``run`` once; ``interrupt`` ends it from outside with the given error."""

    def __init__(
        self,
        request: ValidRequest,
        text: TextStream | None,
        checkpoint_digest: str,
        surroundings: Surroundings,
        arrived_s: float,
    ) -> None:
        self._request = request
        self.checkpoint_digest = checkpoint_digest
        self._text = text
        self._around = surroundings
        self._timing = Timing(arrived_s)
        self._journal = Journal(request.resumed_token_ids, request.sampling.max_tokens)
        self._interruption = Interruption()
        self._search = EndpointSearch(request, checkpoint_digest, surroundings, self._interruption, arrived_s)
        self._stream: SequenceStream | None = None
        self._cached_prompt_tokens = 0
        self._queued_s: float | None = None  # from arrival to the last submit that no loss came before
        self._ahead = 0  # characters of the text to come that the client has: they came with the end of an earlier call
        series = surroundings.metrics.of_request
        self._itl = series.inter_token_latency[request.model,]
        self._generated = series.generation_tokens[request.model,]
        self._uncounted = 0  # generated tokens that the metric has not heard of yet

    @property
    def started(self) -> bool:
        """Whether an engine has generated anything for this call."""
        return self._timing.first_token_s is not None

    def good(self, now_s: float) -> bool:
        """Whether a request that ends now has met the router's objectives."""
        config = self._around.config
        return self._timing.meets(config.ttft_objective_s, config.tpot_objective_s, now_s)

    def interrupt(self, error: Exception) -> None:
        if self._interruption.trip(error) and self._stream is not None:
            self._stream.fail(error)

    def reach_deadline(self) -> None:
        """The client's deadline has come."""
        if self.started:
            self.interrupt(RequestAborted(AbortReason.DEADLINE, "The deadline came before the last token."))
        else:
            self.interrupt(RequestEvicted("The deadline came before the first token; allow the request more time."))

    async def run(self, emit: Emit, deadline_s: float | None) -> Ended:
        """Streams through ``emit`` to the end; raises the request's error otherwise, or ServedElsewhere before that.

        ``deadline_s``: seconds from now. Cancelling the calling task cancels the sequence in its engine.
        """
        loop = asyncio.get_running_loop()
        until_s = None if deadline_s is None else loop.time() + deadline_s
        timer = None if until_s is None else loop.call_at(until_s, self.reach_deadline)
        ended: Ended | None = None
        try:
            ended = await self._replay(emit)
            while ended is None:
                ended = await self._attempt(emit, until_s)
            return ended
        finally:
            self._observe_queue()
            if timer is not None:
                timer.cancel()
            self._count_generated()
            generated, complete = self._journal.generated_tokens, ended is not None
            self._search.close(generated, self._cached_prompt_tokens, complete=complete)
            self._interruption.forget()

    async def _replay(self, emit: Emit) -> Ended | None:
        """Brings the text up to the tokens generated before this call; they may already be the end."""
        resumed = self._request.resumed_token_ids
        if self._text is not None and resumed:
            characters = 0
            for first in range(0, len(resumed), REPLAYED_TOGETHER_MAX):
                characters += len(self._text.push(resumed[first : first + REPLAYED_TOGETHER_MAX]).text)
                if self._text.stopped:
                    return self._ended(inference_pb2.FINISH_REASON_STOP)
                await asyncio.sleep(0)
            # No more than the end of a call can have let out: whoever counts otherwise loses no text that goes on.
            ahead = min(self._request.received_characters - characters, self._text.held_back_max)
            self._ahead = max(0, ahead)
        return await self._finish(emit, inference_pb2.FINISH_REASON_LENGTH) if self._journal.full else None

    async def _attempt(self, emit: Emit, until_s: float | None) -> Ended | None:
        """One try on one endpoint; None when another one has to follow. ``until_s``: the deadline, by the loop."""
        session = await self._search.endpoint(_left_s(until_s))
        attempt = self._journal.begin_attempt()
        incarnation = session.endpoint.incarnation
        try:
            sequence_id, stream = self._submit(session, attempt, until_s)
        except SequenceLost as lost:
            self._journal.withdraw_attempt()
            self._search.not_sent(incarnation, lost.reason)
            return None
        self._stream = stream
        try:
            return await self._follow(emit, stream, incarnation, partial(session.release, sequence_id))
        except SequenceLost as lost:
            if self._journal.full:  # only the engine's last word is missing, and we know it
                return await self._finish(emit, inference_pb2.FINISH_REASON_LENGTH)
            self._search.lost(incarnation, lost.reason)
            return None
        finally:
            self._stream = None
            session.release(sequence_id)
            stream.close()

    def _submit(self, session: EngineSession, attempt: int, until_s: float | None) -> tuple[int, SequenceStream]:
        request = self._request
        submit = engine_pb2.Submit(
            attempt=attempt,
            prompt_token_ids=request.prompt_token_ids,
            generated_token_ids=self._journal.generated,
            sampling=convert.sampling_to_message(request.sampling),
            logprobs=request.sampling.logprobs,
            priority=request.priority,
            deadline_s=_left_s(until_s),  # now: the request may have waited
            request_id=request.request_id,
            cache_salt=request.cache_salt,
        )
        tokens = len(request.prompt_token_ids) + len(self._journal.generated)
        cached = min(self._search.cached_tokens, tokens)
        entry = session.submit(submit, tokens, self._journal.room + UPDATES_SLACK, cached)
        if not self._search.losses:
            self._queued_s = self._around.clock.now() - self._timing.arrived_s
        if attempt == 1:
            self._around.metrics.of_request.prompt_tokens[request.model,].inc(len(request.prompt_token_ids))
        return entry

    def _observe_queue(self) -> None:
        """Once, when the replica that it was sent to last has taken it, or when the request ends without one."""
        if self._queued_s is not None:
            self._around.metrics.of_request.queue_seconds[self._request.model,].observe(self._queued_s)
            self._queued_s = None

    async def _follow(
        self, emit: Emit, stream: SequenceStream, incarnation: Incarnation, release: Callable[[], None]
    ) -> Ended | None:
        """Journals and emits whatever the engine says, until it says that it is over.

        What has come while ``emit`` waited for a slow client goes out together: fewer and larger messages.
        """
        while True:
            news = await stream.receive()
            if news.cached_prompt_tokens:
                self._cached_prompt_tokens = max(self._cached_prompt_tokens, news.cached_prompt_tokens)
            for first in range(0, len(news.token_ids), TOKENS_TOGETHER_MAX):
                taken = self._taken(news, first)
                if self._text is not None and self._text.stopped:
                    release()  # the engine is not to go on while the client takes its time
                    await emit(taken)
                    return self._ended(inference_pb2.FINISH_REASON_STOP)
                await emit(taken)
            end = convert.end_from_message(news.end) if news.end else None
            if end is not None:
                return await self._close(emit, end, news.detail, incarnation)

    def _taken(self, news: News, first: int) -> Progress:
        """The tokens of ``news`` from index ``first`` on, as many as go together, journalled and counted."""
        token_ids = news.token_ids[first : first + min(self._journal.room, TOKENS_TOGETHER_MAX)]
        text = ""
        if self._text is not None:
            text, kept = self._text.push(token_ids)
            if kept < len(token_ids):
                token_ids = token_ids[:kept]
            if self._ahead:
                text = self._unseen(text)
        self._journal.append(token_ids)
        self._search.made_progress()
        self._observe_tokens(len(token_ids))
        logprobs = news.logprobs[first : first + len(token_ids)] if news.logprobs else ()
        return Progress(text, token_ids, logprobs)

    def _unseen(self, text: str) -> str:
        """What of ``text``, which comes next, the client has not got."""
        seen = min(self._ahead, len(text))
        self._ahead -= seen
        return text[seen:]

    def _observe_tokens(self, count: int) -> None:
        now_s, last_s = self._around.clock.now(), self._timing.last_token_s
        if last_s is None:
            self._observe_queue()
            series = self._around.metrics.of_request
            series.time_to_first_token[self._request.model,].observe(now_s - self._timing.arrived_s)
        elif count:
            gap_s = (now_s - last_s) / count
            self._itl.observe(gap_s, count)
        self._timing.took(count, now_s)
        self._uncounted += count
        if self._uncounted >= COUNTED_TOGETHER:
            self._count_generated()

    def _count_generated(self) -> None:
        self._generated.inc(self._uncounted)
        self._uncounted = 0

    async def _close(self, emit: Emit, end: SequenceEnd, detail: str, incarnation: Incarnation) -> Ended | None:
        """The engine's last word, in the request's terms; None when another endpoint is to be tried."""
        if end is SequenceEnd.STOP:
            return await self._finish(emit, inference_pb2.FINISH_REASON_STOP)
        if end is SequenceEnd.LENGTH:
            return await self._finish(emit, inference_pb2.FINISH_REASON_LENGTH)
        if end is SequenceEnd.REJECTED_DRAINING:
            self._search.refused_draining(incarnation)
            return None
        if end is SequenceEnd.REJECTED_CAPACITY:
            self._search.refused_full()
            return None
        if end is SequenceEnd.CANCELLED:
            raise SequenceLost(LossReason.DROPPED)
        if end is SequenceEnd.REJECTED_INVALID:
            self._search.refused_invalid()
            raise RequestRejected(RejectReason.INVALID, detail or "The engine refuses this request.")
        if self.started:
            raise RequestAborted(AbortReason.DEADLINE, "The deadline came before the last token.")
        raise RequestEvicted("The deadline came before the first token; allow the request more time.")

    async def _finish(self, emit: Emit, reason: inference_pb2.FinishReason) -> Ended:
        """Lets the held-back text out; a stop string found in it beats LENGTH."""
        if self._text is not None:
            text = self._unseen(self._text.flush())
            if self._text.stopped:
                reason = inference_pb2.FINISH_REASON_STOP
            if text:
                await emit(Progress(text, (), ()))
        return self._ended(reason)

    def _ended(self, reason: inference_pb2.FinishReason) -> Ended:
        usage = inference_pb2.Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            generated_tokens=self._journal.generated_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            failovers=self._search.losses,
            seed=self._request.sampling.seed,
        )
        return Ended(reason, usage)


def _left_s(until_s: float | None) -> float | None:
    """Seconds until ``until_s`` by the event loop's clock, at least 0; None for no deadline."""
    return None if until_s is None else max(0.0, until_s - asyncio.get_running_loop().time())
