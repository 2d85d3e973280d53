"""Adapter: the client for code without an event loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import grpc

from cluster.client.events import Chunk, Completion
from cluster.client.requests import Options, Prompt, build_request, typed_error
from cluster.client.transcript import Transcript
from cluster.domain.clock import Clock, MonotonicClock
from cluster.domain.errors import ClusterError, RejectReason, RequestRejected
from cluster.v1 import inference_pb2, inference_pb2_grpc
from cluster.wire import channel
from cluster.wire.status import from_rpc_error

if TYPE_CHECKING:
    from cluster.v1.inference_pb2_grpc import InferenceStub

RESUMES_MAX = 10


class Client:
    """The same as AsyncClient, blocking. Threads may share one."""

    def __init__(self, *addresses: str, resumes_max: int = RESUMES_MAX, clock: Clock | None = None) -> None:
        self._addresses = addresses or ("127.0.0.1:50051",)
        self._resumes_max = resumes_max
        self._clock = clock or MonotonicClock()
        self._lock = threading.Lock()
        self._channels: dict[str, grpc.Channel] = {}
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            channels, self._channels = self._channels, {}
        for opened in channels.values():
            opened.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        logprobs: int = 0,
        priority: int = 0,
        timeout_s: float | None = None,
        generated_token_ids: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> Iterator[Chunk | Completion]:
        """Chunks as they come, then one Completion with the whole."""
        request = build_request(
            prompt, options, model=model, request_id=request_id, logprobs=logprobs, priority=priority,
            generated_token_ids=generated_token_ids,
        )  # fmt: skip
        transcript = Transcript(request, self._addresses, self._resumes_max)
        until_s = None if timeout_s is None else self._clock.now() + timeout_s
        while True:
            left_s = None if until_s is None else max(0.0, until_s - self._clock.now())
            address = transcript.address
            call = self._stub(address).Generate(transcript.next_request(), timeout=left_s)
            completion: Completion | None = None
            try:
                for event in call:  # to the status behind the End: hanging up earlier looks like a client that left
                    if event.HasField("end"):
                        completion = transcript.finish(event.end)
                    else:
                        yield transcript.take(event.chunk)
                code, reason, message, retry_after_s = grpc.StatusCode.UNAVAILABLE, "", "", None
            except grpc.RpcError as error:
                code, reason, message, retry_after_s = from_rpc_error(error)
            finally:
                call.cancel()  # a caller that stops iterating stops the generation
            if completion is not None:
                yield completion
                return
            pause_s = transcript.resume_after_s(code.name, retry_after_s)
            if pause_s is None:
                raise typed_error(code.name, reason, message, retry_after_s, address, started=transcript.started)
            self._closed.wait(pause_s)

    def complete(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        logprobs: int = 0,
        priority: int = 0,
        timeout_s: float | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """The whole answer at once, with the same resumption as ``generate``."""
        last: Chunk | Completion | None = None
        for event in self.generate(
            prompt, model=model, request_id=request_id, logprobs=logprobs, priority=priority, timeout_s=timeout_s,
            **options,
        ):  # fmt: skip
            last = event
        assert isinstance(last, Completion), "a stream ends with its Completion"
        return last

    def tokenize(
        self, prompt: Prompt, *, model: str = "", add_special_tokens: bool = False, timeout_s: float | None = 30.0
    ) -> list[int]:
        """The token ids of a text or a chat."""
        whole = build_request(prompt, {}, model=model)
        request = inference_pb2.TokenizeRequest(model=model, add_special_tokens=add_special_tokens)
        if whole.HasField("chat"):
            request.chat.CopyFrom(whole.chat)
        else:
            request.text = whole.text
        try:
            return list(self._stub(self._addresses[0]).Tokenize(request, timeout=timeout_s).ids)
        except grpc.RpcError as error:
            raise self._typed(error) from error

    def list_models(self, *, timeout_s: float | None = 30.0) -> list[inference_pb2.Model]:
        try:
            answer = self._stub(self._addresses[0]).ListModels(inference_pb2.ListModelsRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._typed(error) from error
        return list(answer.models)

    def wait_ready(self, timeout_s: float) -> None:
        """Until a model has a ready replica; RequestRejected NO_ENDPOINT when that takes too long."""
        until_s = self._clock.now() + timeout_s
        pause_s = 0.05
        while (left_s := until_s - self._clock.now()) > 0:
            try:
                if any(model.ready_replicas for model in self.list_models(timeout_s=min(left_s, 5.0))):
                    return
            except ClusterError:
                pass  # it may not listen yet
            self._closed.wait(min(pause_s, max(0.0, until_s - self._clock.now())))
            pause_s = min(2 * pause_s, 1.0)
        raise RequestRejected(
            RejectReason.NO_ENDPOINT, f"No model was ready at {self._addresses[0]} within {timeout_s:g} s."
        )

    def _stub(self, address: str) -> InferenceStub:
        with self._lock:
            if address not in self._channels:
                self._channels[address] = channel.open_sync_channel(address)
            return inference_pb2_grpc.InferenceStub(self._channels[address])

    def _typed(self, error: grpc.RpcError) -> ClusterError:
        code, reason, message, retry_after_s = from_rpc_error(error)
        return typed_error(code.name, reason, message, retry_after_s, self._addresses[0], started=False)
