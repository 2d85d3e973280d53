"""Adapter: the client for asyncio."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import grpc
import grpc.aio

from cluster.client.address_memory import PROCESS_MEMORY, AddressMemory
from cluster.client.events import Chunk, Completion
from cluster.client.requests import (
    Arguments,
    Options,
    Prompt,
    build_request,
    build_tokenize_request,
    closed_before,
    closed_meanwhile,
    error_of_call,
    never_ready,
)
from cluster.client.resume_budget import ResumeBudget
from cluster.client.transcript import RESUMES_MAX, Transcript, flat_addresses
from cluster.config.schema import ROUTER_ADDRESS
from cluster.domain.clock import Clock, MonotonicClock
from cluster.domain.errors import ClusterError
from cluster.v1 import inference_pb2, inference_pb2_grpc
from cluster.wire import channel
from cluster.wire.caller import caller_to_metadata
from cluster.wire.status import CallFailure, from_rpc_error

if TYPE_CHECKING:
    from cluster.v1.inference_pb2_grpc import InferenceStub

Answer = TypeVar("Answer")


class AsyncClient:
    """Speaks to one router, or to several that serve the same cluster; use it as a context manager.

    Errors are those of `cluster.domain.errors`: RequestRejected, RequestEvicted, RequestAborted, ModelNotFound,
    EngineFailed. A stream that breaks because its router or replica did goes on at the next address, exactly where
    it was. ``timeout_s`` covers a whole request, resumes included. ``addresses``: HOST:PORT, one by one or as lists;
    ``rng`` spreads the pauses between calls; ``memory`` says which addresses are away, and is shared by all clients of
    the process if none is given.
    """

    def __init__(
        self,
        *addresses: str | Sequence[str],
        resumes_max: int = RESUMES_MAX,
        rng: random.Random | None = None,
        clock: Clock | None = None,
        memory: AddressMemory | None = None,
    ) -> None:
        self._addresses = flat_addresses(addresses) or (ROUTER_ADDRESS,)
        self._resumes_max = resumes_max
        self._budget = ResumeBudget()
        self._memory = memory or PROCESS_MEMORY
        self._rng = rng
        self._clock = clock or MonotonicClock()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self._closed.set()
        channels, self._channels = self._channels, {}
        for opened in channels.values():
            await opened.close()

    async def generate(  # noqa: PLR0913 - keywords, each with its default
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        logprobs: int = 0,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        session_id: str = "",
        timeout_s: float | None = None,
        generated_token_ids: Sequence[int] = (),
        received_characters: int = 0,
        checkpoint_digest: str = "",
        **options: Unpack[Options],
    ) -> AsyncIterator[Chunk | Completion]:
        """Chunks as they come, then one Completion with the whole.

        ``tenant``: whom the request is counted for; ``session_id``: the conversation it belongs to. Every call of the
        request carries them, as metadata. ``generated_token_ids``: what the request has generated before, and goes on
        behind; ``received_characters``: how much text came with them, if it is known; ``checkpoint_digest``: what they
        were computed with, as their chunks said, so that nothing else goes on behind them.
        """
        metadata = caller_to_metadata(tenant, session_id)
        request = build_request(
            prompt, options, model=model, request_id=request_id, logprobs=logprobs, priority=priority,
            generated_token_ids=generated_token_ids, received_characters=received_characters,
            checkpoint_digest=checkpoint_digest, cache_salt=cache_salt,
        )  # fmt: skip
        transcript = Transcript(
            request, self._addresses, self._resumes_max, budget=self._budget, memory=self._memory, rng=self._rng
        )
        until_s = None if timeout_s is None else self._clock.now() + timeout_s
        while True:
            now_s = self._clock.now()
            left_s = None if until_s is None else max(0.0, until_s - now_s)
            stub = self._stub(transcript.next_address(now_s))
            call = stub.Generate(transcript.next_request(), timeout=left_s, metadata=metadata)
            completion: Completion | None = None
            failure: CallFailure | None = None
            try:
                async for event in call:  # to the status behind the End: hanging up earlier looks like leaving
                    if event.HasField("end"):
                        completion = transcript.finish(event.end)
                    else:
                        yield transcript.take(event.chunk)
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
            except asyncio.CancelledError:
                if self._closed_under_call():
                    raise closed_meanwhile() from None
                raise
            finally:
                call.cancel()  # a caller that stops iterating stops the generation
            if completion is not None:
                yield completion
                return
            now_s = self._clock.now()
            pause_s = transcript.pause_after_s(failure, now_s)
            if await self._closed_within(pause_s if until_s is None else min(pause_s, max(0.0, until_s - now_s))):
                raise closed_meanwhile()

    async def complete(self, prompt: Prompt, **arguments: Unpack[Arguments]) -> Completion:
        """The whole answer at once; everything else is as with ``generate``."""
        last: Chunk | Completion | None = None
        async for event in self.generate(prompt, **arguments):
            last = event
        assert isinstance(last, Completion), "a stream ends with its Completion"
        return last

    async def tokenize(
        self, prompt: Prompt, *, model: str = "", add_special_tokens: bool = False, timeout_s: float | None = 30.0
    ) -> list[int]:
        """The token ids of a text or a chat."""
        request = build_tokenize_request(prompt, model, add_special_tokens=add_special_tokens)
        answer = await self._ask(lambda stub: stub.Tokenize(request, timeout=timeout_s))
        return list(answer.ids)

    async def list_models(self, *, timeout_s: float | None = 30.0) -> list[inference_pb2.Model]:
        answer = await self._ask(lambda stub: stub.ListModels(inference_pb2.ListModelsRequest(), timeout=timeout_s))
        return list(answer.models)

    async def wait_ready(self, timeout_s: float) -> None:
        """Until a model has a ready replica; RequestRejected NO_ENDPOINT when that takes too long."""
        until_s = self._clock.now() + timeout_s
        pause_s = 0.05
        while (left_s := until_s - self._clock.now()) > 0:
            try:
                if any(model.ready_replicas for model in await self.list_models(timeout_s=min(left_s, 5.0))):
                    return
            except ClusterError:  # it may not listen yet
                if self._closed.is_set():
                    raise
            await self._closed_within(min(pause_s, max(0.0, until_s - self._clock.now())))
            pause_s = min(2 * pause_s, 1.0)
        raise never_ready(self._addresses[0], timeout_s)

    async def _ask(self, call: Callable[[InferenceStub], Awaitable[Answer]]) -> Answer:
        """The answer of the first router that is there; the typed error of the last one otherwise."""
        failure: ClusterError | None = None
        untried = list(self._addresses)
        while untried:
            address = self._memory.pick(untried, self._clock.now())
            untried.remove(address)
            try:
                answer = await call(self._stub(address))
            except grpc.RpcError as error:
                code, reason, *_ = broke_with = from_rpc_error(error)
                self._memory.failed(address, code.name, reason, self._clock.now())
                failure = error_of_call(broke_with, address)
                if code is not grpc.StatusCode.UNAVAILABLE:
                    break
            except asyncio.CancelledError:
                if self._closed_under_call():
                    raise closed_before() from None
                raise
            else:
                self._memory.answered(address)
                return answer
        assert failure is not None, "there is an address"
        raise failure

    async def _closed_within(self, seconds: float) -> bool:
        """Waits; whether the client was closed meanwhile, which ends the wait."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        return self._closed.is_set()

    def _closed_under_call(self) -> bool:
        """Whether ``close`` cancelled a call, and not somebody our task: gRPC says the same of both."""
        task = asyncio.current_task()
        return self._closed.is_set() and (task is None or not task.cancelling())

    def _stub(self, address: str) -> InferenceStub:
        if self._closed.is_set():
            raise closed_before()
        if address not in self._channels:
            self._channels[address] = channel.open_channel(address)
        return inference_pb2_grpc.InferenceStub(self._channels[address])
