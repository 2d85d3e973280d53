"""Clients that read slowly, late or never, over real sockets: nobody waits for them, and what they get is the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from cluster.router.forwarding import TOKENS_TOGETHER_MAX
from cluster.v1 import inference_pb2, inference_pb2_grpc
from tests.contract.fake_engine import FakeEngine, scripted_token
from tests.contract.router_cluster import Answer, RouterCluster, eventually

pytestmark = pytest.mark.integration
TOKENS = 8_000
SCRIPT = [index % 997 for index in range(TOKENS)]
PROMPT = (5, 6, 7)
# Little room for what has not been read: a stall begins after a few kilobytes instead of some megabytes.
LITTLE_ROOM = (
    ("grpc.http2.lookahead_bytes", 16384),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

GENEROUS_S = 60.0  # however busy the machine is


def request(tokens: int = TOKENS, request_id: str = "") -> inference_pb2.GenerateRequest:
    ids = inference_pb2.TokenIds(ids=PROMPT)
    sampling = inference_pb2.Sampling(max_tokens=tokens, seed=9)
    return inference_pb2.GenerateRequest(
        token_ids=ids, sampling=sampling, return_token_ids=True, logprobs=1, request_id=request_id
    )


@pytest.fixture
async def cluster() -> AsyncIterator[RouterCluster]:
    lots = FakeEngine(scripted_token(SCRIPT), max_model_len=10**6, tokens_per_step=4)
    started = await RouterCluster(client_stall_s=10.0).start(lots)
    yield started
    await started.close()


async def test_a_client_that_reads_late_gets_all_in_fewer_messages(cluster: RouterCluster) -> None:
    engine = cluster.engines[0]
    largest, answer = 0, Answer()
    async with grpc.aio.insecure_channel(cluster.address, options=LITTLE_ROOM) as narrow:
        cluster.injected += 1
        call = inference_pb2_grpc.InferenceStub(narrow).Generate(request(), timeout=30)
        await eventually(lambda: bool(engine.submits) and not engine.running, "the engine is done: it waits for nobody")
        async for event in call:
            answer.chunks += 1
            answer.token_ids += event.chunk.token_ids
            answer.logprobs += event.chunk.logprobs
            largest = max(largest, len(event.chunk.token_ids))
            answer.end = event.end if event.HasField("end") else None
    assert answer.token_ids == SCRIPT
    assert [logprobs.token_id for logprobs in answer.logprobs] == SCRIPT
    assert answer.reason == "LENGTH"
    assert answer.end is not None
    assert answer.end.usage.generated_tokens == TOKENS
    steps = TOKENS // engine.tokens_per_step
    assert answer.chunks < steps / 2, "what has gathered goes out together"
    assert engine.tokens_per_step < largest <= TOKENS_TOGETHER_MAX
    assert await cluster.outcomes() == {"completed": 1}


async def test_a_slow_client_delays_nobody_else(cluster: RouterCluster) -> None:
    async with grpc.aio.insecure_channel(cluster.address, options=LITTLE_ROOM) as narrow:
        cluster.injected += 1
        slow = inference_pb2_grpc.InferenceStub(narrow).Generate(request())
        await eventually(lambda: bool(cluster.engines[0].submits), "it is running")
        others = await asyncio.gather(*(cluster.generate(request(200)) for _ in range(8)))
        assert [answer.token_ids for answer in others] == [SCRIPT[:200]] * 8
        slow.cancel()
    await eventually(lambda: cluster.router.server.active_requests == 0, "it is gone")
    assert await cluster.outcomes() == {"completed": 8, "aborted_client": 1}


async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """By the router: the client stays and has no deadline, and the engine would go on for minutes."""
    slow = FakeEngine(scripted_token([7]), max_model_len=10**6, tokens_per_step=100, step_s=0.02)
    cluster = await RouterCluster(client_stall_s=0.3).start(slow)
    try:
        async with grpc.aio.insecure_channel(cluster.address, options=LITTLE_ROOM) as narrow:
            cluster.injected += 1
            call = inference_pb2_grpc.InferenceStub(narrow).Generate(request(10**6 - len(PROMPT)))
            await eventually(lambda: slow.cancels == [1], "the engine was told", GENEROUS_S)
            await eventually(lambda: cluster.router.server.active_requests == 0, "the request has ended", GENEROUS_S)
            assert await cluster.outcomes() == {"aborted_client": 1}
            with pytest.raises(grpc.aio.AioRpcError) as cut:
                [event async for event in call]
        assert cut.value.code() is grpc.StatusCode.CANCELLED
    finally:
        await cluster.close()


async def test_a_place_is_free_when_the_engine_is_done_whoever_still_reads() -> None:
    places = 3  # two slots, and one more
    lots = FakeEngine(scripted_token(SCRIPT), max_model_len=10**6, tokens_per_step=64, max_num_seqs=2)
    cluster = await RouterCluster(client_stall_s=GENEROUS_S).start(lots)
    async with grpc.aio.insecure_channel(cluster.address, options=LITTLE_ROOM) as narrow:
        stub = inference_pb2_grpc.InferenceStub(narrow)
        cluster.injected += places
        calls = [stub.Generate(request(), timeout=GENEROUS_S) for _ in range(places)]
        await eventually(lambda: len(lots.submits) == places and not lots.running, "the engine is done with them")
        assert (await cluster.generate(request(3), timeout_s=10.0)).token_ids == SCRIPT[:3]
        assert cluster.router.server.active_requests == places, "nobody has read their tokens"
        assert cluster.router.fleet.outstanding_tokens == 0
        for call in calls:
            call.cancel()
        await asyncio.gather(*(call.code() for call in calls))
    await cluster.close()
