"""Open-loop load on a router, and what became of it: arrivals drawn beforehand, sent when they are due."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import asdict, dataclass

import grpc
import grpc.aio

from cluster.v1 import inference_pb2, inference_pb2_grpc
from cluster.wire import channel
from cluster.wire.caller import caller_to_metadata
from cluster.wire.status import from_rpc_error
from ops.bench.overload.replicas import MODEL

CALL_DEADLINE_S = 60.0


@dataclass(slots=True)
class Sent:
    """One request. Times are seconds from the run's begin; ``end``: OK, or the status's name."""

    at_s: float
    priority: int
    prompt_tokens: int
    tokens: int
    tenant: str = ""
    first_s: float | None = None
    ended_s: float | None = None
    end: str = ""
    retry_after_s: float | None = None
    late_s: float = 0.0  # of the load generator itself

    def good(self, ttft_s: float, tpot_s: float) -> bool:
        if self.end != "OK" or self.first_s is None or self.ended_s is None or self.first_s - self.at_s > ttft_s:
            return False
        return self.tokens < 2 or (self.ended_s - self.first_s) / (self.tokens - 1) <= tpot_s

    def plain(self) -> dict[str, object]:
        return asdict(self)


def arrivals(
    rng: random.Random, per_second: float, begin_s: float, end_s: float, *, mean_tokens: int, high_share: float,
    tenant: str = "",
) -> list[Sent]:  # fmt: skip
    """Poisson arrivals; answers of lognormal length (sigma 0.5), prompts of 10 to 200 tokens."""
    found, at_s = [], begin_s
    while (at_s := at_s + rng.expovariate(per_second)) < end_s:
        tokens = max(1, min(8 * mean_tokens, round(rng.lognormvariate(-0.125, 0.5) * mean_tokens)))
        found.append(Sent(at_s, int(rng.random() < high_share), rng.randint(10, 200), tokens, tenant))
    return found


async def run(address: str, requests: list[Sent]) -> float:
    """Sends every request when it is due and waits for all; the clock (CLOCK_MONOTONIC) at the begin."""
    async with channel.open_channel(address) as opened:
        stub = inference_pb2_grpc.InferenceStub(opened)
        await stub.ListModels(inference_pb2.ListModelsRequest(), wait_for_ready=True, timeout=10)
        begin_s = time.monotonic()
        tasks = []
        for request in sorted(requests, key=lambda r: r.at_s):
            left_s = begin_s + request.at_s - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
            tasks.append(asyncio.create_task(_send(stub, request, begin_s)))
        await asyncio.gather(*tasks)
    return begin_s


async def _send(stub: inference_pb2_grpc.InferenceStub, request: Sent, begin_s: float) -> None:
    message = inference_pb2.GenerateRequest(
        model=MODEL,
        token_ids=inference_pb2.TokenIds(ids=[1] * request.prompt_tokens),
        sampling=inference_pb2.Sampling(max_tokens=request.tokens),
        priority=request.priority,
    )
    request.late_s = time.monotonic() - begin_s - request.at_s
    metadata = caller_to_metadata(request.tenant)
    try:
        async for event in stub.Generate(message, timeout=CALL_DEADLINE_S, metadata=metadata):
            if request.first_s is None and event.HasField("chunk"):
                request.first_s = time.monotonic() - begin_s
        request.end = "OK"
    except grpc.aio.AioRpcError as error:
        request.end = error.code().name
        request.retry_after_s = from_rpc_error(error)[3]
    request.ended_s = time.monotonic() - begin_s
