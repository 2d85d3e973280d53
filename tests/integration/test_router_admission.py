"""The admission desk on real sockets: a router before small fake engines, more requests than they can take."""

import asyncio
import random
from collections import Counter
from typing import Any

import grpc
import pytest

from cluster.v1 import engine_pb2, inference_pb2
from cluster.wire.status import from_rpc_error
from tests.contract.fake_engine import FakeEngine, expected_tokens, hashed_token
from tests.contract.router_cluster import Metadata, RouterCluster, StartCluster, eventually

pytestmark = pytest.mark.integration

NEXT = hashed_token(1000)
PROMPT = [5, 6, 7]


def engine(slot: int = 0, **options: Any) -> FakeEngine:
    """One sequence at once, and one that waits, as the router sees it."""
    return FakeEngine(NEXT, slot=slot, **{"max_num_seqs": 1, "step_s": 0.01, **options})


def request(max_tokens: int = 10, priority: int = 0) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=PROMPT),
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, seed=9),
        return_token_ids=True,
        priority=priority,
    )


def tenant(name: str) -> Metadata:
    return (("x-tenant", name),)


async def ended(
    cluster: RouterCluster, message: inference_pb2.GenerateRequest, **call: Any
) -> tuple[str, float | None]:
    """How a request ended ("OK", or its status and reason), and the advice that came with a refusal."""
    try:
        answer = await cluster.generate(message, **call)
    except grpc.aio.AioRpcError as error:
        code, reason, text, retry_after_s = from_rpc_error(error)
        assert text
        return f"{code.name} {reason}", retry_after_s
    assert answer.token_ids == expected_tokens(NEXT, PROMPT, 9, message.sampling.max_tokens)
    return "OK", None


async def occupied(cluster: RouterCluster, max_tokens: int = 10) -> list[asyncio.Task[tuple[str, float | None]]]:
    """Both places of the only engine are taken, and it stands still until ``go_on``."""
    cluster.engines[0].step_age_s = 0.1
    tasks = [asyncio.create_task(ended(cluster, request(max_tokens))) for _ in range(2)]
    await eventually(lambda: len(cluster.engines[0].running) == 2, "both are there")
    return tasks


def go_on(cluster: RouterCluster) -> None:
    for one in cluster.engines:
        one.step_age_s = 0.0
        one._work.set()


async def queued(cluster: RouterCluster, count: int) -> None:
    for _ in range(1000):
        if f'cluster_router_queued_requests{{model="demo"}} {count}.0' in await cluster.metrics():
            return
    pytest.fail(f"never were {count} requests queued")


async def test_order_of_service(start: StartCluster) -> None:
    """The engine is told of requests by priority, tenants in turns, each in order of arrival; never of more than fit."""
    cluster = await start(engine(), max_queue_wait_s=60.0)
    first = await occupied(cluster)
    wanted = [("heavy", 0)] * 6 + [("light", 0)] * 2 + [("batch", -1), ("urgent", 1)]
    tasks = []
    for number, (name, priority) in enumerate(wanted):
        message = request(3, priority)
        message.request_id = f"{name}-{number}"
        tasks.append(asyncio.create_task(ended(cluster, message, metadata=tenant(name))))
        await queued(cluster, number + 1)
    go_on(cluster)
    assert await asyncio.gather(*first, *tasks) == [("OK", None)] * 12
    order = [submit.request_id for submit in cluster.engines[0].submits[2:]]
    assert order == [
        "urgent-9", "heavy-0", "light-6", "heavy-1", "light-7", "heavy-2", "heavy-3", "heavy-4", "heavy-5", "batch-8",
    ]  # fmt: skip


async def test_ten_times_of_what_can_be_served(start: StartCluster) -> None:
    """Every request ends in one way, what is served is whole, high priority gets through, the rest is told when to come."""
    cluster = await start(*(engine(slot, max_num_seqs=4) for slot in range(2)), max_queue_wait_s=2.0)
    rng = random.Random(3)
    high: list[asyncio.Task[tuple[str, float | None]]] = []
    low: list[asyncio.Task[tuple[str, float | None]]] = []
    for _ in range(100):  # about 60 a second can be served
        for _ in range(6):
            is_high = rng.random() < 0.03
            (high if is_high else low).append(asyncio.create_task(ended(cluster, request(10, int(is_high)))))
        await asyncio.sleep(0.01)
        assert len(cluster.router.fleet._sessions) == 2
        assert all(len(one.running) <= 5 for one in cluster.engines)
    ends = Counter(end for end, _ in await asyncio.gather(*low))
    assert set(ends) == {"OK", "RESOURCE_EXHAUSTED QUEUE_FULL"}
    assert min(ends.values()) > 20
    assert {end for end, _ in await asyncio.gather(*high)} == {"OK"}
    assert all(retry_after_s for end, retry_after_s in [task.result() for task in low] if end != "OK")
    outcomes = await cluster.outcomes()
    assert outcomes == {"completed": ends["OK"] + len(high), "rejected_capacity": ends["RESOURCE_EXHAUSTED QUEUE_FULL"]}
    assert await ended(cluster, request()) == ("OK", None)


async def test_every_end_of_a_request_that_waits(start: StartCluster) -> None:
    cluster = await start(engine(), max_queued_requests=3, max_queue_wait_s=60.0)
    running = await occupied(cluster)
    call = cluster.call(request(priority=-1))
    await queued(cluster, 1)
    pushed_out = asyncio.create_task(ended(cluster, request(priority=-1)))
    await queued(cluster, 2)
    waiting = [asyncio.create_task(ended(cluster, request()))]
    await queued(cluster, 3)
    waiting.append(asyncio.create_task(ended(cluster, request())))
    end, retry_after_s = await pushed_out
    assert (end, bool(retry_after_s)) == ("RESOURCE_EXHAUSTED QUEUE_FULL", True)
    call.cancel()
    await queued(cluster, 2)
    # On a machine that stands still for 20 ms the transport says it before us, and without our reason.
    assert (await ended(cluster, request(), timeout_s=0.2))[0].startswith("DEADLINE_EXCEEDED")
    await queued(cluster, 2)
    assert len(cluster.engines[0].submits) == 2
    go_on(cluster)
    assert await asyncio.gather(*running, *waiting) == [("OK", None)] * 4
    await eventually(lambda: cluster.router.server.active_requests == 0, "all are over")
    assert await cluster.outcomes() == {
        "completed": 4, "evicted_deadline": 1, "aborted_client": 1, "rejected_capacity": 1,
    }  # fmt: skip


async def test_who_has_waited_for_too_long_hears_when_to_come_back(start: StartCluster) -> None:
    cluster = await start(engine(), max_queue_wait_s=0.2)
    running = await occupied(cluster)
    end, retry_after_s = await ended(cluster, request())
    assert (end, bool(retry_after_s)) == ("RESOURCE_EXHAUSTED QUEUE_FULL", True)
    go_on(cluster)
    assert await asyncio.gather(*running) == [("OK", None)] * 2
    assert await cluster.outcomes() == {"completed": 2, "rejected_capacity": 1}


async def test_a_router_that_stops_lets_waiting_requests_go(start: StartCluster) -> None:
    cluster = await start(engine(), drain_deadline_s=0.2, max_queue_wait_s=60.0)
    tasks = [*await occupied(cluster), asyncio.create_task(ended(cluster, request()))]
    await queued(cluster, 1)
    assert await cluster.stop_router() == 0
    assert [end for end, _ in await asyncio.gather(*tasks)] == ["UNAVAILABLE DRAINING"] * 3


async def test_when_the_last_engine_dies_waiting_requests_hear_of_it_at_once(start: StartCluster) -> None:
    cluster = await start(engine(), max_queue_wait_s=60.0, failover_wait_s=0.2)
    running = await occupied(cluster)
    waiting = asyncio.create_task(ended(cluster, request()))
    await queued(cluster, 1)
    await cluster.control.push()
    assert (await asyncio.wait_for(waiting, 2))[0] == "UNAVAILABLE NO_ENDPOINT"
    assert {end for end, _ in await asyncio.gather(*running)} == {"UNAVAILABLE REPLICA_FAILED"}


async def test_what_lost_its_replica_goes_before_all_others(start: StartCluster) -> None:
    cluster = await start(engine(0, max_num_seqs=2, die_after=10), engine(1), max_queue_wait_s=60.0)
    dying, other = cluster.engines
    dying.step_age_s = other.step_age_s = 0.1
    occupying = [asyncio.create_task(ended(cluster, request(25))) for _ in range(5)]
    await eventually(lambda: len(dying.running) == 3 and len(other.running) == 2, "every place is taken")
    lost_ids = {sequence.submit.request_id for sequence in dying.running.values()}
    waiting = [asyncio.create_task(ended(cluster, request(3, priority=5))) for _ in range(4)]
    await queued(cluster, 4)
    go_on(cluster)
    assert await asyncio.gather(*occupying, *waiting) == [("OK", None)] * 9
    assert {submit.request_id for submit in other.submits[2:5]} == lost_ids


async def test_a_place_that_was_none_after_all_is_looked_for_again(start: StartCluster) -> None:
    cluster = await start(engine(reject=engine_pb2.SEQUENCE_END_REJECTED_CAPACITY), max_queue_wait_s=60.0)
    task = asyncio.create_task(ended(cluster, request()))
    await eventually(lambda: len(cluster.engines[0].submits) >= 2, "it was sent back and tried again")
    cluster.engines[0].reject = engine_pb2.SEQUENCE_END_UNSPECIFIED
    assert await task == ("OK", None)
    text = await cluster.metrics()
    assert 'cluster_router_queue_seconds_count{model="demo"} 1.0' in text
    queued_s = float(text.partition('cluster_router_queue_seconds_sum{model="demo"} ')[2].partition("\n")[0])
    first_s, *_, last_s = cluster.engines[0].submitted_s
    assert queued_s > 0.9 * (last_s - first_s), "the waits for the tries behind the first one count as well"


async def test_a_tenant_has_a_name_of_bounded_length(start: StartCluster) -> None:
    cluster = await start(engine())
    assert (await ended(cluster, request(), metadata=tenant("x" * 65)))[0] == "INVALID_ARGUMENT INVALID"
    assert (await ended(cluster, request(), metadata=tenant("x" * 64)))[0] == "OK"
