"""Adapter: the Inference service. Every request that enters leaves with exactly one Outcome."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

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
from cluster.router.fleet import Fleet
from cluster.router.forwarding import Ended, Progress, RequestRun, Surroundings
from cluster.router.session import ServedModel
from cluster.router.text import TextStream
from cluster.router.tokenization import Tokenizer, TokenizerCache
from cluster.telemetry.logs import Logger
from cluster.v1 import inference_pb2, inference_pb2_grpc
from cluster.wire.status import to_rpc_status, wire_status

REQUEST_ID_KEY = "x-request-id"
UNKNOWN_MODEL = "unknown"  # the label of requests that name no served model: labels are a closed set
RETRY_AFTER_S = 1.0
# Our own deadline comes a moment before the transport's, so that its status carries a reason.
DEADLINE_MARGIN_S = 0.02
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(slots=True)
class _Call:
    """One request inside: what it is called, which label counts it, and how to end it from outside."""

    request_id: str
    arrived_s: float
    deadline_s: float | None
    model: str = UNKNOWN_MODEL
    run: RequestRun | None = None
    answered: bool = False  # its End is on the way: whoever hangs up now has got everything


class InferenceServer(inference_pb2_grpc.InferenceServicer):
    """Generate, Complete, ListModels and Tokenize on one Fleet.

    ``drain`` refuses new requests and ends when the running ones have, or were interrupted at the deadline.
    """

    def __init__(self, around: Surroundings, tokenizers: TokenizerCache, log: Logger) -> None:
        self._around = around
        self._tokenizers = tokenizers
        self._log = log
        self._calls: set[int] = set()
        self._runs: set[RequestRun] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active_requests(self) -> int:
        return len(self._calls)

    async def Generate(  # noqa: N802 - the service's name
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> None:
        async with self._counted(request, context) as call:
            await context.send_initial_metadata(((REQUEST_ID_KEY, call.request_id),))

            async def emit(progress: Progress) -> None:
                chunk = _chunk(progress, with_ids=with_ids)
                if chunk is not None:
                    await context.write(inference_pb2.GenerateResponse(chunk=chunk))

            run, with_ids = await self._prepare(request, call)
            ended = await self._run(run, emit, call)
            end = inference_pb2.End(finish_reason=ended.finish_reason, usage=ended.usage)
            call.answered = True
            await context.write(inference_pb2.GenerateResponse(end=end))

    async def Complete(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> inference_pb2.Completion:
        completion = inference_pb2.Completion()
        async with self._counted(request, context) as call:
            await context.send_initial_metadata(((REQUEST_ID_KEY, call.request_id),))
            texts: list[str] = []

            async def emit(progress: Progress) -> None:
                texts.append(progress.text)
                completion.logprobs.extend(progress.logprobs)
                if with_ids:
                    completion.token_ids.extend(progress.token_ids)

            run, with_ids = await self._prepare(request, call)
            ended = await self._run(run, emit, call)
            completion.text = "".join(texts)
            completion.finish_reason = ended.finish_reason
            completion.usage.CopyFrom(ended.usage)
        return completion

    async def ListModels(  # noqa: N802
        self, _request: inference_pb2.ListModelsRequest, _context: _Context
    ) -> inference_pb2.ListModelsResponse:
        fleet = self._around.fleet
        return inference_pb2.ListModelsResponse(models=[_model(fleet, name) for name in fleet.models])

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        try:
            return inference_pb2.TokenizeResponse(ids=await self._tokenize(request))
        except ClusterError as error:
            await context.abort_with_status(to_rpc_status(error))

    async def drain(self, deadline_s: float) -> None:
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        for run in tuple(self._runs):
            run.interrupt(_draining())
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), 1.0)

    @asynccontextmanager
    async def _counted(self, request: inference_pb2.GenerateRequest, context: _Context) -> AsyncIterator[_Call]:
        """Admits a request, and counts the one way in which it ends; errors become its gRPC status."""
        clock, metrics = self._around.clock, self._around.metrics
        remaining_s: float | None = context.time_remaining()
        deadline_s = None if remaining_s is None else max(0.0, remaining_s - DEADLINE_MARGIN_S)
        call = _Call(request.request_id or uuid.uuid4().hex, clock.now(), deadline_s)
        outcome = Outcome.FAILED_INTERNAL
        try:
            validation.check_request_id(call.request_id)
            self._admit(call)
            yield call
            outcome = Outcome.COMPLETED
        except asyncio.CancelledError:
            outcome = _outcome_of_cancellation(call, clock.now())
            raise
        except ClusterError as error:
            outcome = wire_status(error).outcome
            await context.abort_with_status(to_rpc_status(error))
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            outcome = _outcome_of_cancellation(call, clock.now())  # the client left while we wrote
            raise asyncio.CancelledError from None
        except Exception as error:  # boundary: a bug must cost one request only, and be told
            self._log.exception("internal_error", request_id=call.request_id)
            await context.abort_with_status(to_rpc_status(error))
        finally:
            self._dismiss(call)
            metrics.requests.labels(model=call.model, outcome=outcome.value).inc()
            metrics.request_duration.labels(model=call.model).observe(clock.now() - call.arrived_s)

    def _admit(self, call: _Call) -> None:
        if self._draining:
            raise _draining()
        limit = self._around.config.max_concurrent_requests
        if len(self._calls) >= limit:
            message = f"{limit} requests are in flight, which is this router's limit; try again in a moment."
            raise RequestRejected(RejectReason.QUEUE_FULL, message, RETRY_AFTER_S)
        self._calls.add(id(call))
        self._idle.clear()

    def _dismiss(self, call: _Call) -> None:
        self._calls.discard(id(call))
        if call.run is not None:
            self._runs.discard(call.run)
        if not self._calls:
            self._idle.set()

    async def _prepare(self, request: inference_pb2.GenerateRequest, call: _Call) -> tuple[RequestRun, bool]:
        """The request validated and tokenized; and whether its answer carries token ids."""
        try:
            served = self._around.fleet.served(request.model)
        except RequestRejected:
            call.model = request.model or UNKNOWN_MODEL
            raise
        card, tokenizer = served.card, served.tokenizer
        call.model = card.name
        sampling = validation.check_fields(request, card, has_tokenizer=tokenizer is not None)
        prompt = await self._prompt_ids(request, served)
        valid = validation.resolve(request, call.request_id, sampling, card, prompt)
        text = TextStream(tokenizer.vocabulary, valid.stops, valid.sampling.min_tokens) if tokenizer else None
        call.run = RequestRun(valid, text, card.checkpoint_digest, self._around, call.arrived_s)
        self._runs.add(call.run)
        return call.run, request.return_token_ids or tokenizer is None

    async def _run(self, run: RequestRun, emit: Callable[[Progress], Awaitable[None]], call: _Call) -> Ended:
        if call.deadline_s is None:
            return await run.run(emit, None)
        spent_s = self._around.clock.now() - call.arrived_s
        return await run.run(emit, max(0.0, call.deadline_s - spent_s))

    async def _prompt_ids(self, request: inference_pb2.GenerateRequest, served: ServedModel) -> list[int]:
        if request.WhichOneof("prompt") == "token_ids":
            return list(request.token_ids.ids)
        assert served.tokenizer is not None, "checked before"
        is_text = request.WhichOneof("prompt") == "text"
        text = request.text if is_text else _rendered(served.tokenizer, request.chat)
        validation.check_text_length(text, served.tokenizer.longest_token_characters, served.card)
        return await self._tokenizers.encode(served.tokenizer, text, add_special_tokens=is_text)

    async def _tokenize(self, request: inference_pb2.TokenizeRequest) -> list[int]:
        served = self._around.fleet.served(request.model)
        if served.tokenizer is None:
            raise RequestRejected(RejectReason.INVALID, f"Model {served.card.name} has no tokenizer.")
        kind = request.WhichOneof("input")
        if kind is None:
            raise RequestRejected(RejectReason.INVALID, "There is nothing to tokenize; set text or chat.")
        if kind == "chat":
            validation.check_chat(request.chat)
            text = _rendered(served.tokenizer, request.chat)
        else:
            text = request.text
        return await self._tokenizers.encode(
            served.tokenizer, text, add_special_tokens=request.add_special_tokens and kind == "text"
        )


def _rendered(tokenizer: Tokenizer, chat: inference_pb2.Chat) -> str:
    return tokenizer.render_chat([{"role": m.role, "content": m.content} for m in chat.messages])


def _chunk(progress: Progress, *, with_ids: bool) -> inference_pb2.Chunk | None:
    """What a client gets to see of some progress; None when that is nothing."""
    ids = progress.token_ids if with_ids else ()
    if not (progress.text or ids or progress.logprobs):
        return None
    return inference_pb2.Chunk(text=progress.text, token_ids=ids, logprobs=progress.logprobs)


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
    return RequestRejected(RejectReason.DRAINING, message, RETRY_AFTER_S)


def _outcome_of_cancellation(call: _Call, now_s: float) -> Outcome:
    """Whether a call that was cancelled under us was over, had reached its deadline or was left by its client."""
    if call.answered:
        return Outcome.COMPLETED
    if call.deadline_s is None or now_s - call.arrived_s < call.deadline_s:
        error: ClusterError = RequestAborted(AbortReason.CLIENT, "")
    elif call.run is not None and call.run.started:
        error = RequestAborted(AbortReason.DEADLINE, "")
    else:
        error = RequestEvicted("")
    return wire_status(error).outcome
