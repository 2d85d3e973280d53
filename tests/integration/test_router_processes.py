"""A router of several processes: one port, one /metrics, children that die, parents that die, signals."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster.client import AsyncClient, Completion
from cluster.config.listening import can_listen
from cluster.config.schema import RouterConfig
from cluster.domain.errors import PortTakenError, ReplicaError
from cluster.router import process_group
from cluster.router.process_group import RunningProcesses, serve_processes
from cluster.v1 import inference_pb2, inference_pb2_grpc
from cluster.wire.status import from_rpc_error
from tests.contract.fake_control import FakeControl
from tests.contract.fake_engine import FakeEngine, expected_tokens, hashed_token
from tests.contract.router_cluster import eventually
from tests.contract.router_processes import RouterProcess, is_gone, kill, own_connection

pytestmark = pytest.mark.integration
NEXT = hashed_token(300)
PROCESSES = 2
StartRouter = Callable[..., Awaitable[RouterProcess]]


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    started = await FakeEngine(NEXT, vocab_size=300, step_s=0.005, max_model_len=4096).start()
    yield started
    await started.stop()


@pytest.fixture
async def control(engine: FakeEngine) -> AsyncIterator[FakeControl]:
    started = await FakeControl().start()
    await started.push(engine.endpoint)
    yield started
    await started.stop()


@pytest.fixture
async def start(control: FakeControl) -> AsyncIterator[StartRouter]:
    routers: list[RouterProcess] = []

    async def start_router(**options: Any) -> RouterProcess:
        router = await RouterProcess.start(control.address, **{"processes": PROCESSES, **options})
        routers.append(router)
        await router.until_ready()
        return router

    yield start_router
    for router in routers:
        await router.close()


def pids_of(control: FakeControl) -> list[int]:
    return [watcher.pid for watcher in control.watchers]


def message(max_tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[1, 2]),
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, seed=3),
        return_token_ids=True,
    )


async def complete(address: str, max_tokens: int = 5) -> list[int]:
    """The tokens, over a connection of its own."""
    async with own_connection(address) as opened:
        answer = await inference_pb2_grpc.InferenceStub(opened).Complete(message(max_tokens), timeout=20)
        return list(answer.token_ids)


async def until_restarted(router: RouterProcess, times: int) -> None:
    """Until ``times`` processes were started again, and all listen."""
    restarts, listening = {"": float(times)}, {"": float(PROCESSES)}
    async with asyncio.timeout(30):
        while (
            await router.series("cluster_router_process_restarts_total") != restarts
            or await router.series("cluster_router_processes") != listening
        ):
            await asyncio.sleep(0.05)


async def test_processes_share_port_metrics_and_drain(
    start: StartRouter, control: FakeControl, engine: FakeEngine
) -> None:
    router = await start(processes=3)
    assert router.ready["pid"] == router.process.pid
    await eventually(lambda: len(control.attended) == 1, "the parent is a process of the cluster too")
    assert (control.attended[0].kind, control.attended[0].pid) == ("router", router.process.pid)
    assert dict(control.attended[0].ports) == router.ports
    assert len(set(pids_of(control))) == 3
    assert len({watcher.router_id for watcher in control.watchers}) == 3
    assert all(dict(watcher.ports) == {"grpc": router.ports["grpc"]} for watcher in control.watchers)
    answers = await asyncio.gather(*(complete(router.address) for _ in range(40)))
    assert answers == [expected_tokens(NEXT, [1, 2], 3, 5)] * 40
    assert len(engine.submitters) == 3, "the kernel spread the connections"
    assert await router.outcomes() == {"completed": 40}
    assert await router.series("cluster_router_generation_tokens_total") == {'{model="demo"}': 200.0}
    assert await router.series("cluster_router_time_to_first_token_seconds_count") == {'{model="demo"}': 40.0}
    assert await router.series("cluster_router_endpoints") == {'{model="demo"}': 1.0}
    assert await router.series("cluster_router_processes") == {"": 3.0}
    assert (await router.page("/readyz"))[0] == (await router.page("/healthz"))[0] == 200

    streams = [asyncio.create_task(complete(router.address, 200)) for _ in range(8)]
    await eventually(lambda: len(engine.running) == 8, "all are running")
    router.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(5):
        while (await router.page("/readyz"))[0] == 200:
            await asyncio.sleep(0.005)
    assert engine.running, "readiness went before the streams"
    assert await asyncio.gather(*streams) == [expected_tokens(NEXT, [1, 2], 3, 200)] * 8
    assert await asyncio.wait_for(router.process.wait(), 20) == 0
    assert all(map(is_gone, pids_of(control)))


async def test_a_process_that_dies_is_started_again_and_nothing_is_lost(
    start: StartRouter, control: FakeControl, engine: FakeEngine
) -> None:
    router = await start()
    await asyncio.gather(*(complete(router.address) for _ in range(10)))
    assert await router.outcomes() == {"completed": 10}
    async with AsyncClient(router.address) as client:
        token_ids: list[int] = []
        async for event in client.generate([1, 2], max_tokens=60, seed=3):
            if isinstance(event, Completion):
                completion = event
                break
            token_ids += event.token_ids
            if len(token_ids) == 7:
                for pid in pids_of(control):  # all: nobody knows who has the stream
                    kill(pid)
    assert token_ids == list(completion.token_ids) == expected_tokens(NEXT, [1, 2], 3, 60)
    assert completion.usage.resumes >= 1
    await until_restarted(router, PROCESSES)
    await asyncio.gather(*(complete(router.address) for _ in range(10)))
    assert await router.outcomes() == {"completed": 21}
    config = RouterConfig(port=router.ports["grpc"], metrics_port=0, processes=2)
    with pytest.raises(PortTakenError, match="choose another port"):
        await serve_processes(config, control.address)
    assert await router.end() == 0


async def test_what_drains_too_long_is_unavailable_in_every_process(start: StartRouter, engine: FakeEngine) -> None:
    router = await start(drain_deadline_s=0.3)
    opened = [own_connection(router.address) for _ in range(6)]
    calls = [inference_pb2_grpc.InferenceStub(one).Generate(message(4000)) for one in opened]
    received = await asyncio.gather(*(call.read() for call in calls))
    router.process.send_signal(signal.SIGTERM)
    for call, first in zip(calls, received, strict=True):
        known = list(first.chunk.token_ids)
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - what came before counts
            while True:
                known += (await call.read()).chunk.token_ids
        assert from_rpc_error(caught.value)[:2] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert known == expected_tokens(NEXT, [1, 2], 3, len(known)), "what came is what a resume goes on from"
    assert await asyncio.wait_for(router.process.wait(), 20) == 0
    for one in opened:
        await one.close()


async def test_children_of_a_killed_parent_leave_the_port_and_finish(
    start: StartRouter, control: FakeControl, engine: FakeEngine
) -> None:
    router = await start()
    streams = [asyncio.create_task(complete(router.address, 250)) for _ in range(4)]
    await eventually(lambda: len(engine.running) == 4, "all are running")
    children = pids_of(control)
    router.kill()
    await router.process.wait()
    await eventually(lambda: can_listen("127.0.0.1", router.ports["grpc"]), "the port is free for another router")
    assert len(engine.running) == 4, "the streams outlive their port"
    assert await asyncio.gather(*streams) == [expected_tokens(NEXT, [1, 2], 3, 250)] * 4
    await eventually(lambda: all(map(is_gone, children)), "the children end after their streams")


async def test_without_a_controller_a_process_started_anew_serves_from_the_last_table(
    start: StartRouter, control: FakeControl, tmp_path: Path
) -> None:
    state_file = tmp_path / "endpoints.json"
    router = await start(state_file=state_file)
    await eventually(state_file.exists, "the table is saved")
    await control.stop()
    first, *others = pids_of(control)
    kill(first)
    await eventually(lambda: is_gone(first), "it is gone")
    await asyncio.gather(*(complete(router.address) for _ in range(4)))  # by those that live: the dead has no port
    assert (await router.page("/readyz"))[0] == 200
    for pid in others:  # nobody is left who was given the table
        kill(pid)
    await until_restarted(router, PROCESSES)
    await asyncio.gather(*(complete(router.address) for _ in range(10)))
    await control.start()
    await eventually(lambda: len(control.watchers) >= 2 * PROCESSES, "a controller that returns is followed")
    assert await router.end() == 0


async def test_a_process_that_does_not_start_ends_all(control: FakeControl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "CHILD", (process_group.CHILD[0], "-c", "import sys; sys.stdin.readline()"))
    with pytest.raises(ReplicaError, match="did not start: it ended without a word"):
        await serve_processes(RouterConfig(port=0, metrics_port=0, processes=2), control.address)


HANGS = """
import asyncio, sys, threading
from cluster.router import loop_beat, one_process
loop_beat.LATE_S, plain = 0.5, one_process._answer
def answer(said):
    plain(said)
    asyncio.get_running_loop().call_soon(threading.Event().wait)
one_process._answer = answer
sys.exit(one_process.main())
"""


async def test_a_process_whose_event_loop_hangs_is_killed(
    control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads go on to show metrics."""
    monkeypatch.setattr(process_group, "CHILD", (process_group.CHILD[0], "-c", HANGS))
    monkeypatch.setattr(process_group, "ROLL_CALL_S", 0.05)
    groups: list[RunningProcesses] = []
    config = RouterConfig(port=0, metrics_port=0, processes=2, drain_deadline_s=0.0)
    serving = asyncio.create_task(serve_processes(config, control.address, started=groups.append))
    await eventually(lambda: bool(groups), "both listen", 30.0)
    first = groups[0].children()
    await eventually(lambda: all(map(is_gone, first)), "both were killed", 20.0)
    groups[0].stop()
    assert await asyncio.wait_for(serving, 30) == 0


@pytest.mark.long
async def test_a_process_that_stands_still_is_replaced_and_its_clients_go_on(
    start: StartRouter, control: FakeControl, engine: FakeEngine
) -> None:
    router = await start()
    async with AsyncClient(router.address) as client:
        token_ids: list[int] = []
        async for event in client.generate([1, 2], max_tokens=60, seed=3):
            if isinstance(event, Completion):
                break
            token_ids += event.token_ids
            if len(token_ids) == 7:
                for pid in pids_of(control):  # all: nobody knows who has the stream
                    os.kill(pid, signal.SIGSTOP)
    assert token_ids == expected_tokens(NEXT, [1, 2], 3, 60)
    await until_restarted(router, PROCESSES)
    assert await complete(router.address) == expected_tokens(NEXT, [1, 2], 3, 5)
    assert await router.end() == 0
