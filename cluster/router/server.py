"""Adapter: the Inference service. Every request that enters leaves with exactly one Outcome."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio

from cluster.domain.errors import (
    AbortReason,
    ClusterError,
    ModelNotFound,
    RejectReason,
    RequestAborted,
    RequestEvicted,
    RequestRejected,
)
from cluster.domain.request import Outcome
from cluster.router import validation
from cluster.router.client_writer import ClientStalled, ClientWriter
from cluster.router.fleet import Fleet
from cluster.router.forwarding import Emit, Ended, Progress, RequestRun
from cluster.router.placing import ServedElsewhere
from cluster.router.responses import response_of
from cluster.router.route_explanation import route_explanation, unserved_explanation
from cluster.router.session import ServedModel
from cluster.router.surroundings import Surroundings
from cluster.router.text import TextStream
from cluster.router.tokenizer_cache import TokenizerCache
from cluster.router.validation import ValidRequest
from cluster.telemetry.logs import Logger
from cluster.v1 import inference_pb2, inference_pb2_grpc, routing_pb2
from cluster.wire.caller import caller_from_metadata
from cluster.wire.status import to_rpc_status, wire_status

REQUEST_ID_KEY = "x-request-id"
UNKNOWN_MODEL = "unknown"  # the label of requests that name no served model: labels are a closed set
DRAIN_MARGIN_S = 1.0  # for those that were interrupted at the end of a drain, to end
CUT_OFF_S = 0.1  # a status that a stalled client's transport does not take by then is not sent
# Our own deadline comes a moment before the transport's, so that its status carries a reason.
# gRPC rounds grpc-timeout up as it grows: (timeouts below, by at most), in seconds. Without a margin of that size the
# client would give up before our typed answer, and we would take it for a client that left.
DEADLINE_MARGINS_S = ((10.0, 0.02), (100.0, 0.12), (1000.0, 1.02))
LONGEST_MARGIN_S = 10.02
MOVES_MAX = 3  # of a request from the checkpoint that it waits for to another one
REQUEST_ID_BYTES = 16  # of an id that we assign
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Call:
    """One request inside: what it is called, which label counts it, and how to end it from outside.

    ``counted``: it belongs into the metrics of generation.
    """

    request_id: str
    named: bool  # by its client
    arrived_s: float
    deadline_s: float | None
    model: str
    tenant: str = ""
    session_key: str = ""
    counted: bool = True
    run: RequestRun | None = None
    tells_ids: bool = False  # its answer carries token ids
    digest: str = ""  # of the checkpoint, which the next message tells
    echo: tuple[tuple[str, str], ...] = ()  # comes with the status
    answered: bool = False  # its End is on the way: whoever hangs up now has got everything
    writer: ClientWriter | None = None
    stalled: bool = False  # its client takes no messages, perhaps no status either
    leave: Callable[[], object] = lambda: None  # takes it off the running ones


class InferenceServer(inference_pb2_grpc.InferenceServicer):
    """Generate, Complete, ListModels and Tokenize on one Fleet; and ExplainRoute of the service Routing.

    ``drain`` refuses new requests and ends when the running ones have, or were interrupted at the deadline.
    """

    def __init__(self, around: Surroundings, tokenizers: TokenizerCache, log: Logger) -> None:
        self._around = around
        self._tokenizers = tokenizers
        self._log = log
        self._calls: set[int] = set()
        self._runs: dict[RequestRun, _Call] = {}
        self._draining = False
        self._drained = False  # the time to finish is over
        self._idle: asyncio.Future[None] | None = None  # of somebody who waits for the last call

    @property
    def active_requests(self) -> int:
        return len(self._calls)

    async def Generate(  # noqa: N802 - the service's name
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> None:
        call = self._call(request.model, request.request_id, context)

        async def answer() -> None:
            await _tell_id(call, context)
            writer = call.writer = ClientWriter(context.write, self._around.config.client_stall_s)

            def emit(progress: Progress) -> Awaitable[None]:
                response = response_of(progress, with_ids=call.tells_ids, digest=call.digest)
                if response is None:
                    return _nothing()
                call.digest = ""
                return writer.write(response)

            ended = await self._generated(request, call, emit)
            end = inference_pb2.End(finish_reason=ended.finish_reason, usage=ended.usage)
            call.answered = True
            await writer.write(inference_pb2.GenerateResponse(end=end))

        await self._inside(call, context, answer)

    async def Complete(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> inference_pb2.Completion:
        call = self._call(request.model, request.request_id, context)

        async def answer() -> inference_pb2.Completion:
            await _tell_id(call, context)
            completion = inference_pb2.Completion()
            texts: list[str] = []

            async def emit(progress: Progress) -> None:
                texts.append(progress.text)
                completion.logprobs.extend(progress.logprobs)
                if call.tells_ids:
                    completion.token_ids.extend(progress.token_ids)

            ended = await self._generated(request, call, emit)
            completion.text = "".join(texts)
            completion.finish_reason = ended.finish_reason
            completion.usage.CopyFrom(ended.usage)
            return completion

        return await self._inside(call, context, answer)

    async def ListModels(  # noqa: N802
        self, _request: inference_pb2.ListModelsRequest, _context: _Context
    ) -> inference_pb2.ListModelsResponse:
        fleet = self._around.fleet
        return inference_pb2.ListModelsResponse(models=[_model(fleet, name) for name in fleet.models])

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        call = self._call(request.model, "", context, counted=False)

        async def answer() -> inference_pb2.TokenizeResponse:
            return inference_pb2.TokenizeResponse(ids=await self._tokenize(request, call))

        return await self._inside(call, context, answer)

    async def ExplainRoute(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> routing_pb2.RouteExplanation:
        """Where the request would go if it came now, or why it would go nowhere; nothing is sent or counted."""
        call = self._call(request.model, request.request_id, context, counted=False)
        fleet = self._around.fleet

        async def answer() -> routing_pb2.RouteExplanation:
            try:
                fleet.served(request.model)
            except RequestRejected:
                model = fleet.resolve(request.model)
                if model is None:
                    raise
                return unserved_explanation(fleet, model, request, call.session_key)  # none of its replicas is up
            valid, served = await self._valid(request, call)
            return route_explanation(fleet, valid, served.card.checkpoint_digest)

        return await self._inside(call, context, answer)

    async def drain(self, deadline_s: float) -> None:
        self._draining = True
        await self._until_idle(deadline_s)
        self._drained = True
        self._tokenizers.refuse(_draining)
        for run, call in tuple(self._runs.items()):
            run.interrupt(_draining())
            if call.writer is not None and not call.answered and call.writer.interrupt(_draining()):
                call.stalled = True  # it waits for its client rather than for an engine
        await self._until_idle(DRAIN_MARGIN_S)

    async def _until_idle(self, limit_s: float) -> None:
        """Until the last call has ended, or so long."""
        if self._calls:
            if self._idle is None or self._idle.done():
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._idle], timeout=limit_s)

    def _call(self, model: str, request_id: str, context: _Context, *, counted: bool = True) -> _Call:
        remaining_s: float | None = context.time_remaining()
        deadline_s = None if remaining_s is None else deadline_within(remaining_s)
        label = self._around.fleet.resolve(model) or UNKNOWN_MODEL
        tenant, session_key = caller_from_metadata(context.invocation_metadata())
        named = bool(request_id)
        request_id = request_id or os.urandom(REQUEST_ID_BYTES).hex()
        return _Call(request_id, named, self._around.clock.now(), deadline_s, label, tenant, session_key, counted)

    async def _inside(self, call: _Call, context: _Context, answer: Callable[[], Awaitable[Answer]]) -> Answer:
        """Admits a call, and counts the one way in which it ends; errors become its gRPC status."""
        clock = self._around.clock
        outcome = Outcome.FAILED_INTERNAL
        try:
            validation.check_request_id(call.request_id)
            call.echo = ((REQUEST_ID_KEY, call.request_id),)
            validation.check_caller(call.tenant, call.session_key)
            self._admit(call)
            answered = await answer()
            outcome = Outcome.COMPLETED
            return answered  # noqa: TRY300 - nothing after it may count as an error of its own
        except asyncio.CancelledError:
            outcome = _outcome_of_cancellation(call, clock.now(), drained=self._drained)
            raise
        except ClusterError as error:
            outcome = wire_status(error).outcome
            await self._abort(error, call, context)
        except ClientStalled:
            outcome = Outcome.ABORTED_CLIENT
            call.stalled = True
            await self._abort(_stalled(self._around.config.client_stall_s), call, context)
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            outcome = _outcome_of_cancellation(
                call, clock.now(), drained=self._drained
            )  # the client left while we wrote
            raise asyncio.CancelledError from None
        except Exception as error:  # boundary: a bug must cost one request only, and be told
            self._log.exception("internal_error", request_id=call.request_id)
            await self._abort(error, call, context)
        finally:
            self._dismiss(call)
            if call.counted:
                self._count(call, outcome)

    def count_unserved(self, outcome: Outcome) -> None:
        """A Generate or Complete ended before there was a request to look at."""
        self._around.metrics.of_request.requests[UNKNOWN_MODEL, outcome].inc(1)

    def _count(self, call: _Call, outcome: Outcome) -> None:
        series, now_s = self._around.metrics.of_request, self._around.clock.now()
        series.requests[call.model, outcome].inc(1)
        series.request_duration[call.model,].observe(now_s - call.arrived_s)
        if outcome is Outcome.COMPLETED and call.run is not None and call.run.good(now_s):
            series.goodput_requests[call.model,].inc(1)

    async def _abort(self, error: Exception, call: _Call, context: _Context) -> NoReturn:
        """Ends the call with the status of ``error``; always raises."""
        if not call.stalled:
            await context.abort_with_status(to_rpc_status(error, call.echo))
        self._log.warning("client_stalled", request_id=call.request_id, model=call.model)
        with suppress(TimeoutError):
            async with asyncio.timeout(CUT_OFF_S):
                await context.abort_with_status(to_rpc_status(error, call.echo))
        raise asyncio.CancelledError  # the transport resets the stream

    def _admit(self, call: _Call) -> None:
        if self._draining:
            raise _draining()
        limit = self._around.config.max_concurrent_requests
        if len(self._calls) >= limit:
            message = f"{limit} requests are in flight, which is this router's limit; try again in a moment."
            raise RequestRejected(RejectReason.QUEUE_FULL, message)
        self._calls.add(id(call))

    def _dismiss(self, call: _Call) -> None:
        self._calls.discard(id(call))
        if call.writer is not None:
            call.writer.close()
        self._leave_run(call)
        if self._idle is not None and not self._calls and not self._idle.done():
            self._idle.set_result(None)

    async def _generated(self, request: inference_pb2.GenerateRequest, call: _Call, emit: Emit) -> Ended:
        """Runs the request; anew when it waits for a checkpoint that another one takes over from."""
        for moves_left in range(MOVES_MAX, -1, -1):
            run = await self._prepare(request, call, movable=moves_left > 0)
            try:
                return await run.run(emit, self._left_s(call))
            except ServedElsewhere:
                self._leave_run(call)
        raise AssertionError("the last run is not movable")

    def _leave_run(self, call: _Call) -> None:
        if call.run is not None:
            self._runs.pop(call.run, None)
        call.leave()
        call.leave = lambda: None

    async def _prepare(self, request: inference_pb2.GenerateRequest, call: _Call, *, movable: bool) -> RequestRun:
        valid, served = await self._valid(request, call)
        if not movable:
            valid = valid._replace(movable=False)
        card, tokenizer = served.card, served.tokenizer
        text = TextStream(tokenizer.vocabulary, valid.stops, valid.sampling.min_tokens) if tokenizer else None
        call.run = RequestRun(valid, text, card.checkpoint_digest, self._around, call.arrived_s)
        self._runs[call.run] = call
        if self._drained:
            call.run.interrupt(_draining())
        running = self._around.metrics.of_request.running[call.model,]
        running.inc(1)
        call.leave = lambda: running.inc(-1)
        call.tells_ids = request.return_token_ids or tokenizer is None
        call.digest = card.checkpoint_digest if call.tells_ids else ""
        return call.run

    async def _valid(self, request: inference_pb2.GenerateRequest, call: _Call) -> tuple[ValidRequest, ServedModel]:
        """The request checked and tokenized, and what serves it."""
        served = self._around.fleet.served(request.model, request.checkpoint_digest)
        call.model = served.card.name
        sampling = validation.check_fields(request, served.card, has_tokenizer=served.tokenizer is not None)
        prompt = await self._prompt_ids(request, served, call)
        valid = validation.resolve(
            request, call.request_id, sampling, served.card, prompt, tenant=call.tenant, session_key=call.session_key
        )
        return valid, served

    def _left_s(self, call: _Call) -> float | None:
        """Seconds until the call's deadline; None when it has none."""
        if call.deadline_s is None:
            return None
        return max(0.0, call.deadline_s - (self._around.clock.now() - call.arrived_s))

    async def _prompt_ids(
        self, request: inference_pb2.GenerateRequest, served: ServedModel, call: _Call
    ) -> Sequence[int]:
        if request.WhichOneof("prompt") == "token_ids":
            return request.token_ids.ids
        if request.WhichOneof("prompt") == "text":
            return await self._encode(served, request.text, call, request.priority, add_special_tokens=True)
        return await self._encode_chat(served, request.chat, call, request.priority)

    async def _encode_chat(
        self, served: ServedModel, chat: inference_pb2.Chat, call: _Call, priority: int = 0
    ) -> list[int]:
        """The prompt that the chat ``chat``, checked before, makes."""
        tokenizer, card = served.tokenizer, served.card
        assert tokenizer is not None, "checked before"
        longest = tokenizer.longest_token_characters
        validation.check_chat_length(chat, longest, card)

        def check(prompt: str) -> None:
            validation.check_text_length(prompt, longest, card)

        return await self._tokenizers.encode_chat(
            tokenizer, chat.messages, check, tenant=call.tenant, priority=priority, left_s=self._left_s(call)
        )

    async def _encode(
        self, served: ServedModel, text: str, call: _Call, priority: int = 0, *, add_special_tokens: bool
    ) -> list[int]:
        tokenizer = served.tokenizer
        assert tokenizer is not None, "checked before"
        validation.check_text_length(text, tokenizer.longest_token_characters, served.card)
        return await self._tokenizers.encode(
            tokenizer,
            text,
            add_special_tokens=add_special_tokens,
            tenant=call.tenant,
            priority=priority,
            left_s=self._left_s(call),
        )

    async def _tokenize(self, request: inference_pb2.TokenizeRequest, call: _Call) -> list[int]:
        served = self._around.fleet.served(request.model)
        if served.tokenizer is None:
            raise RequestRejected(RejectReason.INVALID, f"Model {served.card.name} has no tokenizer.")
        kind = request.WhichOneof("input")
        if kind is None:
            raise RequestRejected(RejectReason.INVALID, "There is nothing to tokenize; set text or chat.")
        if kind == "text":
            return await self._encode(served, request.text, call, add_special_tokens=request.add_special_tokens)
        validation.check_chat(request.chat)
        return await self._encode_chat(served, request.chat, call)


async def _tell_id(call: _Call, context: _Context) -> None:
    """An id that we have assigned at once; one that the client knows with the end: what comes early is a message more.

    gRPC sends initial metadata together with nothing else, at a third of the price of the simplest call.
    """
    if call.named:
        context.set_trailing_metadata(call.echo)
    else:
        echo, call.echo = call.echo, ()
        await context.send_initial_metadata(echo)


async def _nothing() -> None:
    """To be awaited where there is nothing to write."""


def _model(fleet: Fleet, name: str) -> inference_pb2.Model:
    model = inference_pb2.Model(name=name, ready_replicas=fleet.ready_replicas(name))
    with suppress(RequestRejected, ModelNotFound):
        card = fleet.served(name).card
        model.max_model_len = card.max_model_len
        model.checkpoint_digest = card.checkpoint_digest
        model.vocab_size = card.vocab_size
    return model


def _draining() -> RequestRejected:
    message = "This router is shutting down; send the request, with the tokens received so far, to another one."
    return RequestRejected(RejectReason.DRAINING, message)


def _stalled(stall_s: float) -> RequestAborted:
    message = f"The client has read nothing for client_stall_s ({stall_s:g} s); read the stream as it comes."
    return RequestAborted(AbortReason.CLIENT, message)


def deadline_within(remaining_s: float) -> float:
    """Seconds until our own deadline, which has to come before the client's."""
    margin_s = next((margin for below, margin in DEADLINE_MARGINS_S if remaining_s < below), LONGEST_MARGIN_S)
    return max(0.0, remaining_s - margin_s)


def _outcome_of_cancellation(call: _Call, now_s: float, *, drained: bool) -> Outcome:
    """Whether a call that was cancelled under us was over, had reached its deadline or was left by its client.

    ``drained``: all calls were told to end, and clients hear of that rather than leave.
    """
    if call.answered:
        return Outcome.COMPLETED
    if call.deadline_s is None or now_s - call.arrived_s < call.deadline_s:
        error: ClusterError = _draining() if drained else RequestAborted(AbortReason.CLIENT, "")
    elif call.run is not None and call.run.started:
        error = RequestAborted(AbortReason.DEADLINE, "")
    else:
        error = RequestEvicted("")
    return wire_status(error).outcome
