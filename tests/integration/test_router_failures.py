"""What the router learns from failures: who is ejected, who is slow, what is tried again, and what never is."""

import asyncio
import contextlib
from typing import Any

import grpc
import pytest

from cluster.router.endpoint_table import Standing
from cluster.v1 import engine_pb2, inference_pb2
from cluster.wire.status import from_rpc_error
from tests.contract.fake_engine import FakeEngine, expected_tokens, hashed_token
from tests.contract.router_cluster import RouterCluster, StartCluster, eventually

pytestmark = pytest.mark.integration
NEXT = hashed_token(300)
POISON = 299


def engine(slot: int = 0, **options: Any) -> FakeEngine:
    return FakeEngine(NEXT, slot=slot, vocab_size=300, **options)


def request(max_tokens: int, prompt: tuple[int, ...] = (1, 2), seed: int = 3) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, seed=seed),
        return_token_ids=True,
    )


async def ending(cluster: RouterCluster, sent: inference_pb2.GenerateRequest) -> tuple[str, float | None]:
    """("OK", None), or the status' code and after how long to try again."""
    try:
        answer = await cluster.generate(sent)
    except grpc.aio.AioRpcError as error:
        code, _, _, retry_after_s = from_rpc_error(error)
        return code.name, retry_after_s
    assert answer.token_ids == expected_tokens(NEXT, sent.token_ids.ids, sent.sampling.seed, sent.sampling.max_tokens)
    return "OK", None


def standing(cluster: RouterCluster, slot: int) -> Standing:
    return cluster.router.fleet.health.standing(cluster.engines[slot].endpoint.incarnation)


def retries(cluster: RouterCluster) -> int:
    return sum(submit.attempt > 1 for e in cluster.engines for submit in e.submits)


async def test_all_streams_of_a_dead_replica_go_on(start: StartCluster) -> None:
    streams = 500
    cluster = await start(engine(0, step_s=0.5), engine(1, step_s=0.5))
    running = [asyncio.create_task(ending(cluster, request(10, seed=seed))) for seed in range(streams)]
    victim = cluster.engines[0]
    await eventually(lambda: sum(len(e.submits) for e in cluster.engines) == streams, "all have begun")
    held = len(victim.running)
    victim.dead.set()
    for one in cluster.engines:
        one.step_s = 0.05
    assert {await answer for answer in running} == {("OK", None)}
    assert held > streams / 4
    assert retries(cluster) <= held


async def test_where_everything_breaks_little_is_tried_again_and_all_is_answered(start: StartCluster) -> None:
    cluster = await start(*(engine(slot, break_after=1) for slot in range(4)))
    while any(e.sessions == 1 for e in cluster.engines):  # each has its grant behind it, for a single stream
        await ending(cluster, request(3))
    await cluster.until_ready(4)
    before, sent, began_s = retries(cluster), 300, asyncio.get_running_loop().time()
    answers = await asyncio.gather(*(ending(cluster, request(40, seed=seed)) for seed in range(sent)))
    took_s = asyncio.get_running_loop().time() - began_s
    assert {code for code, _ in answers} == {"UNAVAILABLE"}
    assert all(retry_after_s is not None and 0 < retry_after_s <= 2 for _, retry_after_s in answers)
    assert retries(cluster) - before <= 0.2 * sent + 10 + took_s + 4
    assert 'cluster_router_retries_refused_total{reason="budget"}' in await cluster.metrics()


async def test_a_request_that_kills_whatever_it_meets_ends_after_three_replicas(start: StartCluster) -> None:
    cluster = await start(*(engine(slot, dies_of=POISON, step_s=0.02) for slot in range(5)))
    innocent = [asyncio.create_task(ending(cluster, request(30, seed=seed))) for seed in range(10)]
    await eventually(lambda: sum(len(e.running) for e in cluster.engines) == 10, "they run")
    assert (await ending(cluster, request(9, prompt=(POISON,))))[0] == "UNAVAILABLE"
    assert sum(e.dead.is_set() for e in cluster.engines) == 3
    assert {await answer for answer in innocent} == {("OK", None)}
    assert 'cluster_router_retries_refused_total{reason="fruitless"} 1.0' in await cluster.metrics()


async def test_an_endpoint_that_broke_gets_nothing_new_until_a_probe_succeeds(start: StartCluster) -> None:
    cluster = await start(engine(0), engine(1))
    flapping = cluster.engines[0]
    flapping.break_after = 1
    while flapping.sessions == 1:
        assert (await ending(cluster, request(3)))[0] == "OK"
    flapping.break_after = None
    await cluster.until_ready(2)
    assert standing(cluster, 0) is Standing.EJECTED
    flapping.step_age_s = 0.1  # only beats: its probe gets no token for now
    given, probe = len(flapping.submits), None
    while len(flapping.submits) == given:
        probe = asyncio.create_task(ending(cluster, request(2)))
        await eventually(lambda one=probe: one.done() or len(flapping.submits) > given, "it is answered, or the probe")
    for seed in range(10):
        assert (await ending(cluster, request(2, seed=seed)))[0] == "OK"
    assert len(flapping.submits) == given + 1
    assert standing(cluster, 0) is Standing.EJECTED
    flapping.step_age_s = 0.0
    assert probe is not None
    assert (await probe)[0] == "OK"
    assert standing(cluster, 0) is Standing.HEALTHY
    while len(flapping.submits) < given + 5:
        assert (await ending(cluster, request(2)))[0] == "OK"
    text = await cluster.metrics()
    assert 'cluster_router_ejections_total{reason="broken"} 1.0' in text
    assert 'cluster_router_endpoint_standing{replica="demo/0",standing="healthy"} 1.0' in text


async def test_a_probe_that_is_refused_says_nothing_of_its_endpoint(start: StartCluster) -> None:
    cluster = await start(engine(0), engine(1))
    flapping = cluster.engines[0]
    flapping.break_after = 1
    while flapping.sessions == 1:
        assert (await ending(cluster, request(3)))[0] == "OK"
    flapping.break_after, flapping.reject = None, engine_pb2.SEQUENCE_END_REJECTED_CAPACITY
    await cluster.until_ready(2)
    given = len(flapping.submits)
    while len(flapping.submits) == given:  # sooner or later one of them is the probe
        assert (await ending(cluster, request(2)))[0] == "OK"
    assert cluster.router.fleet.health.ejections.suspected(flapping.endpoint.incarnation)


@pytest.mark.parametrize("end", [engine_pb2.SEQUENCE_END_REJECTED_CAPACITY, engine_pb2.SEQUENCE_END_REJECTED_INVALID])
async def test_what_an_engine_answers_ejects_nobody(start: StartCluster, end: engine_pb2.SequenceEnd) -> None:
    cluster = await start(engine(0, reject=end), engine(1, reject=end))
    for _ in range(3):
        assert (await ending(cluster, request(3)))[0] in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
    assert [standing(cluster, slot) for slot in (0, 1)] == [Standing.HEALTHY] * 2


async def test_a_slow_replica_is_drained_of_new_work(start: StartCluster) -> None:
    cluster = await start(*(engine(slot, step_s=s, max_num_seqs=8) for slot, s in enumerate((0.01, 0.01, 0.1))))
    slow = cluster.engines[2]
    busy = [asyncio.create_task(ending(cluster, request(14, seed=seed))) for seed in range(9)]
    await eventually(lambda: standing(cluster, 2) is Standing.SLOW, "it is noticed")
    given = len(slow.submits)
    assert given > 0
    for seed in range(20):
        assert (await ending(cluster, request(3, seed=seed)))[0] == "OK"
    assert len(slow.submits) == given
    assert [standing(cluster, slot) for slot in (0, 1)] == [Standing.HEALTHY] * 2
    assert {(await answer)[0] for answer in busy} == {"OK"}
    assert 'cluster_router_ejections_total{reason="slow"} 1.0' in await cluster.metrics()


async def test_streams_leave_a_replica_that_is_much_slower(start: StartCluster) -> None:
    cluster = await start(*(engine(slot, step_s=0.01, max_num_seqs=16) for slot in range(3)))
    running = [asyncio.create_task(ending(cluster, request(200, seed=seed))) for seed in range(12)]
    slow = cluster.engines[2]
    await eventually(lambda: sum(len(e.running) for e in cluster.engines) == 12, "all run")
    there = len(slow.running)
    await eventually(
        lambda: all(s.sent > 20 for e in cluster.engines for s in e.running.values()), "their pace is known"
    )
    slow.step_s = 0.15
    await eventually(lambda: not slow.running, "all have left")
    assert {await answer for answer in running} == {("OK", None)}, "and their tokens are what they were"
    assert there > 1
    assert retries(cluster) == there
    assert f'cluster_router_failovers_total{{reason="slow"}} {there}.0' in await cluster.metrics()
    assert await cluster.outcomes() == {"completed": 12}


async def test_streams_that_find_no_place_elsewhere_stay_where_they_are_or_come_back(start: StartCluster) -> None:
    """Two replicas of four become slow at once, while the others have places for a few of their streams only."""
    fleet = [engine(slot, step_s=0.01, max_num_seqs=4) for slot in range(4)]
    cluster = await start(*fleet, failover_wait_s=0.3)
    running = [asyncio.create_task(ending(cluster, request(120, seed=seed))) for seed in range(14)]
    await eventually(lambda: sum(len(e.running) for e in fleet) == 14, "all run")
    await eventually(lambda: all(s.sent > 20 for e in fleet for s in e.running.values()), "their pace is known")
    for slot, one in enumerate(fleet):
        one.step_s = 0.02 if slot < 2 else 0.2
    await eventually(lambda: retries(cluster) > 0, "some have left")
    # Three steps take longer than failover_wait_s.
    stayed = [(e, key, s, s.sent + 3) for e in fleet[2:] for key, s in e.running.items()]
    await eventually(lambda: all(s.sent >= due or key not in e.running for e, key, s, due in stayed), "they go on")
    for one in fleet:
        one.step_s = 0.01
    assert {await answer for answer in running} == {("OK", None)}
    assert await cluster.outcomes() == {"completed": 14}


async def test_a_probe_whose_client_leaves_is_followed_by_another() -> None:
    """A replica that broke and is up again gets one request for a try: that one proves nothing if it is given up."""
    broken, sound = (FakeEngine(hashed_token(300), slot=slot, vocab_size=300) for slot in range(2))
    cluster = await RouterCluster().start(broken, sound)
    asked = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[1, 2]), sampling=inference_pb2.Sampling(max_tokens=2)
    )

    async def until(submits: int, timeout_s: float) -> None:
        """Requests, one after the other, until so many have come to the replica."""
        async with asyncio.timeout(6):
            while len(broken.submits) < submits:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await cluster.generate(asked, timeout_s=timeout_s)
                await asyncio.sleep(0.01)

    broken.break_after = 1
    await until(1, 10.0)
    broken.break_after, broken.step_age_s = None, 0.1  # up again, and no token comes
    await cluster.until_ready(2)
    tried = len(broken.submits)
    await until(tried + 1, 0.3)  # the probe, and its client leaves
    broken.step_age_s = 0.0
    broken._work.set()
    await until(tried + 2, 10.0)
    await cluster.close()
