"""Streams sent when they are due, with the time of every token and of the answer's end."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import grpc
import grpc.aio

from cluster.v1 import inference_pb2, inference_pb2_grpc
from cluster.wire import channel
from cluster.wire.status import from_rpc_error
from ops.bench.overload.replicas import MODEL, token_at

CALL_DEADLINE_S = 180.0


@dataclass(slots=True)
class Stream:
    """One request. Times are seconds from the run's begin; ``end``: OK, or the status's name.

    ``reason``: that of its ErrorInfo.
    """

    at_s: float
    tokens: int
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    exact: bool = True
    ended_s: float = 0.0
    end: str = ""
    reason: str = ""
    retry_after_s: float | None = None

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(when it ended, how long it was) of every wait between two tokens."""
        return [(after, after - before) for before, after in zip(self.token_s, self.token_s[1:], strict=False)]


def arrivals(seed: int, per_second: float, begin_s: float, end_s: float, mean_tokens: int) -> list[Stream]:
    """Poisson arrivals; answers of lognormal length (sigma 0.5), at most four times the mean."""
    rng, found, at_s = random.Random(seed), [], begin_s
    while (at_s := at_s + rng.expovariate(per_second)) < end_s:
        tokens = max(2, min(4 * mean_tokens, round(rng.lognormvariate(-0.125, 0.5) * mean_tokens)))
        found.append(Stream(at_s, tokens))
    return found


async def run(address: str, streams: list[Stream], begin_s: float) -> None:
    """Sends every stream when it is due, whether or not others are back, and waits for all."""
    async with channel.open_channel(address) as opened:
        stub = inference_pb2_grpc.InferenceStub(opened)
        tasks = []
        for stream in sorted(streams, key=lambda s: s.at_s):
            left_s = begin_s + stream.at_s - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
            tasks.append(asyncio.create_task(_send(stub, stream, begin_s)))
        await asyncio.gather(*tasks)


async def _send(stub: inference_pb2_grpc.InferenceStub, stream: Stream, begin_s: float) -> None:
    request = inference_pb2.GenerateRequest(
        model=MODEL,
        token_ids=inference_pb2.TokenIds(ids=[1] * 32),
        sampling=inference_pb2.Sampling(max_tokens=stream.tokens),
        return_token_ids=True,
    )
    stream.sent_s = time.monotonic() - begin_s
    try:
        async for event in stub.Generate(request, timeout=CALL_DEADLINE_S):
            now_s = time.monotonic() - begin_s
            for token in event.chunk.token_ids:
                stream.exact &= token == token_at(len(stream.token_s))
                stream.token_s.append(now_s)
        stream.end = "OK"
        stream.exact &= len(stream.token_s) == stream.tokens
    except grpc.aio.AioRpcError as error:
        code, stream.reason, _, stream.retry_after_s = from_rpc_error(error)
        stream.end = code.name
    stream.ended_s = time.monotonic() - begin_s
