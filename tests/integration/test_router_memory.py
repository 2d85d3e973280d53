"""Requests that have ended leave nothing behind that only the collector of cycles would find: it seldom looks."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress

import grpc
import grpc.aio
import pytest

from cluster.router.forwarding import RequestRun
from cluster.router.placing import EndpointSearch
from cluster.router.validation import ValidRequest
from cluster.v1 import engine_pb2, inference_pb2
from tests.contract.fake_engine import FakeEngine, scripted_token
from tests.contract.router_cluster import RouterCluster, eventually

pytestmark = pytest.mark.integration
SLOTS = 2
KINDS = (RequestRun, EndpointSearch, ValidRequest)


@pytest.fixture
async def cluster() -> AsyncIterator[RouterCluster]:
    engines = [FakeEngine(scripted_token([900]), slot=slot, max_model_len=10**6, max_num_seqs=SLOTS) for slot in (0, 1)]
    started = await RouterCluster(max_queue_wait_s=0.2).start(*engines)
    yield started
    await started.close()


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def request(tokens: int) -> inference_pb2.GenerateRequest:
    ids = inference_pb2.TokenIds(ids=[1])
    sampling = inference_pb2.Sampling(max_tokens=tokens, seed=1)
    return inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling, return_token_ids=True)


async def generate(cluster: RouterCluster, tokens: int, timeout_s: float = 30.0) -> None:
    with suppress(grpc.aio.AioRpcError):
        await cluster.generate(request(tokens), timeout_s=timeout_s)


async def completed(cluster: RouterCluster) -> None:
    await generate(cluster, 5)


async def left(cluster: RouterCluster) -> None:
    call = cluster.call(request(10**5))
    await call.read()
    call.cancel()


async def too_late(cluster: RouterCluster) -> None:
    await generate(cluster, 10**5, timeout_s=0.2)


async def refused(cluster: RouterCluster) -> None:
    await generate(cluster, 10**7)  # longer than the model takes


async def refused_by_the_engine(cluster: RouterCluster) -> None:
    for engine in cluster.engines:
        engine.reject = engine_pb2.SEQUENCE_END_REJECTED_INVALID
    await generate(cluster, 5)
    for engine in cluster.engines:
        engine.reject = engine_pb2.SEQUENCE_END_UNSPECIFIED


async def waited_in_vain(cluster: RouterCluster) -> None:
    stand_still(cluster, seconds=0.1)
    occupying = [asyncio.create_task(generate(cluster, 5)) for _ in range(2 * (SLOTS + 1))]
    await eventually(lambda: sum(len(e.running) for e in cluster.engines) == 2 * (SLOTS + 1), "every place is taken")
    await asyncio.gather(*(generate(cluster, 5) for _ in range(3)))
    stand_still(cluster, seconds=0.0)
    await asyncio.gather(*occupying)


async def lost_its_replica(cluster: RouterCluster) -> None:
    sessions = sum(engine.sessions for engine in cluster.engines)
    cluster.engines[0].break_after = cluster.engines[1].break_after = 2
    while sum(engine.sessions for engine in cluster.engines) == sessions:
        await generate(cluster, 5)
    cluster.engines[0].break_after = cluster.engines[1].break_after = None
    await cluster.until_ready(2)


def stand_still(cluster: RouterCluster, *, seconds: float) -> None:
    for engine in cluster.engines:
        engine.step_age_s = seconds


@pytest.mark.parametrize(
    "happens", [completed, left, too_late, refused, refused_by_the_engine, waited_in_vain, lost_its_replica]
)
@pytest.mark.usefixtures("uncollected")
async def test_nothing_of_a_request_is_left(
    cluster: RouterCluster, happens: Callable[[RouterCluster], Awaitable[None]]
) -> None:
    for _ in range(3):
        await happens(cluster)
    await eventually(lambda: cluster.router.server.active_requests == 0, "all have ended")
    await eventually(lambda: left_over() == {}, left_over)


def left_over() -> dict[str, int]:
    # By their very types: asking a stranger for its class may run code of its own, such as a warning.
    found = [type(each).__name__ for each in gc.get_objects() if type(each) in KINDS]
    return {name: found.count(name) for name in found}
