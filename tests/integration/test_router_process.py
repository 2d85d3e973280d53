"""The router as a process: tables remembered, controllers that come and go, draining, signals."""

import asyncio
import json
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client import AsyncClient
from cluster.config.schema import RouterConfig
from cluster.domain.endpoint import EndpointTable
from cluster.domain.errors import PortTakenError, RejectReason, RequestRejected
from cluster.router import loop_beat
from cluster.router.service import serve_router
from cluster.router.watch import EndpointWatch, load_table, save_table
from cluster.telemetry.logs import get_logger
from cluster.v1 import control_pb2, inference_pb2, inference_pb2_grpc
from cluster.wire import channel
from cluster.wire.status import from_rpc_error
from tests.contract.fake_control import FakeControl
from tests.contract.fake_engine import FakeEngine, expected_tokens, hashed_token
from tests.contract.router_cluster import RouterCluster, StartCluster, eventually

pytestmark = pytest.mark.integration
NEXT = hashed_token(300)
CHILD = """
import json, sys
from cluster.config.schema import RouterConfig
from cluster.router.service import run_router
from cluster.telemetry.logs import configure_logs
configure_logs("router")
say = lambda router: print(json.dumps(router.ready_line), flush=True)
heavy = {"torch", "ray", "transformers", "deepspeed"} & set(sys.modules)
assert not heavy, heavy
sys.exit(run_router(RouterConfig(port=0, metrics_port=0), sys.argv[1], started=say))
"""


def engine(slot: int = 0, **options: Any) -> FakeEngine:
    return FakeEngine(NEXT, slot=slot, vocab_size=300, **options)


def request(max_tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[1, 2]),
        sampling=inference_pb2.Sampling(max_tokens=max_tokens, seed=3),
        return_token_ids=True,
    )


async def test_the_router_introduces_itself(start: StartCluster) -> None:
    cluster = await start(engine())
    (met,) = cluster.control.watchers
    assert met.router_id == cluster.router.router_id
    assert dict(met.ports) == dict(cluster.router.ports)
    assert met.pid > 0


async def test_a_router_whose_event_loop_hangs_says_so(start: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_beat, "BEAT_S", 0.01)
    cluster = await start(engine())
    url = f"http://127.0.0.1:{cluster.router.ports['metrics']}/healthz"

    def status() -> int:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert await asyncio.to_thread(status) == 200
    monkeypatch.setattr(loop_beat, "LATE_S", 0.2)
    deadline = time.monotonic() + 20
    while status() != 503:  # asked on the loop itself, which runs nothing else meanwhile
        assert time.monotonic() < deadline
    monkeypatch.setattr(loop_beat, "LATE_S", 5.0)
    assert await asyncio.to_thread(status) == 200
    assert (await cluster.generate(request(5))).reason == "LENGTH"


async def test_the_last_table_outlives_the_controller_and_the_router(start: StartCluster, tmp_path: Path) -> None:
    state_file = tmp_path / "endpoints.json"
    cluster = await start(engine(), state_file=state_file)
    await eventually(lambda: load_table(state_file) == cluster.control.table, "the table is saved")
    await cluster.control.stop()
    assert (await cluster.generate(request(5))).token_ids == expected_tokens(NEXT, [1, 2], 3, 5)
    second = await start(state_file=state_file)
    second.control.table = cluster.control.table
    await second.until_ready(1)
    assert (await second.generate(request(5))).token_ids == expected_tokens(NEXT, [1, 2], 3, 5)


async def test_tables_of_an_earlier_epoch_are_ignored(start: StartCluster) -> None:
    cluster = await start(engine())
    await cluster.control.push(*(e.endpoint for e in cluster.engines), epoch=5)
    await eventually(lambda: cluster.router.fleet.epoch == 5, "the table came")
    await cluster.control.push(epoch=4)
    await cluster.control.push(cluster.engines[0].endpoint, epoch=6)
    await eventually(lambda: cluster.router.fleet.epoch == 6, "the next table came")
    assert cluster.router.fleet.ready


async def test_a_remembered_table_gives_way_to_a_new_controllers_first(start: StartCluster, tmp_path: Path) -> None:
    state_file = tmp_path / "endpoints.json"
    save_table(state_file, EndpointTable(9, (engine(1).endpoint,), ("gone",), "old state"))
    cluster = await start(state_file=state_file)
    await cluster.control.push(epoch=1, state_id="new state")
    await eventually(lambda: cluster.router.fleet.models == ("demo",), "the new controller's table is in force")
    await eventually(lambda: load_table(state_file) == cluster.control.table, "and is saved")


async def test_a_table_that_cannot_be_used_does_not_end_the_watch() -> None:
    control = await FakeControl().start()
    taken: list[EndpointTable] = []

    def take(table: EndpointTable) -> bool:
        if table.epoch == 1:
            raise ZeroDivisionError
        taken.append(table)
        return True

    await control.push()
    watch = EndpointWatch(control.address, control_pb2.WatchEndpointsRequest(), take, None, get_logger())
    await eventually(lambda: len(control.watchers) >= 2, "it asks again")
    await control.push(epoch=2)
    await eventually(lambda: bool(taken) and taken[-1] == control.table, "the next table is heard")
    await watch.close()
    await control.stop()


async def test_a_controller_that_comes_back_is_followed_again(start: StartCluster) -> None:
    cluster = await start(engine(0), engine(1))
    await cluster.control.stop()
    await cluster.control.start()
    await cluster.control.push(cluster.engines[0].endpoint)
    await cluster.until_ready(1)
    assert len(cluster.control.watchers) == 2


@pytest.mark.parametrize("text", ["", "{", '{"epoch": "x"}', "[]"])
def test_a_damaged_state_file_is_no_table(tmp_path: Path, text: str) -> None:
    state_file = tmp_path / "endpoints.json"
    state_file.write_text(text)
    assert load_table(state_file) is None


async def test_draining_lets_streams_end_and_takes_nothing_new(start: StartCluster) -> None:
    cluster = await start(engine(step_s=0.01))
    running = asyncio.create_task(cluster.generate(request(40)))
    await eventually(lambda: bool(cluster.engines[0].running), "one is running")
    cluster.router.stop()
    await eventually(lambda: cluster.router.server._draining, "it drains")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request(5))
    code, reason, _, retry_s = from_rpc_error(caught.value)
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert retry_s
    assert (await running).token_ids == expected_tokens(NEXT, [1, 2], 3, 40)
    assert await asyncio.wait_for(cluster._serving, 10) == 0


async def test_what_drains_too_long_is_unavailable(start: StartCluster) -> None:
    cluster = await start(engine(step_s=0.02), drain_deadline_s=0.1)
    running = asyncio.create_task(cluster.generate(request(200)))
    await eventually(lambda: bool(cluster.engines[0].running), "one is running")
    cluster.router.stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running
    assert from_rpc_error(caught.value)[:2] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert await asyncio.wait_for(cluster._serving, 10) == 0


async def test_a_taken_port_is_one_sentence(start: StartCluster) -> None:
    cluster = await start()
    config = RouterConfig(port=cluster.router.ports["grpc"], metrics_port=0)
    with pytest.raises(PortTakenError, match="choose another port"):
        await serve_router(config, cluster.control.address)


async def test_a_process_of_its_own_ends_on_sigterm(start: StartCluster) -> None:
    cluster = await start(engine(step_s=0.01))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, cluster.control.address,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 20))
        assert (ready["kind"], ready["pid"]) == ("router", process.pid)
        async with AsyncClient(f"127.0.0.1:{ready['ports']['grpc']}") as client:
            await client.wait_ready(10)
            events = client.generate([1, 2], max_tokens=30, seed=3)
            first = await anext(events)
            process.send_signal(signal.SIGTERM)
            rest = [event async for event in events]
        assert first.token_ids + rest[-1].token_ids[len(first.token_ids) :] == tuple(
            expected_tokens(NEXT, [1, 2], 3, 30)
        )
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class TestClientAcrossRouters:
    async def test_a_stream_goes_on_at_another_router_exactly(self, start: StartCluster) -> None:
        engines = [engine(step_s=0.01)]
        first = await start(*engines, drain_deadline_s=0.0)
        second = await start()
        await second.control.push(engines[0].endpoint)
        await second.until_ready(1)
        callers = [cluster.watch_callers() for cluster in (first, second)]
        async with AsyncClient(first.address, second.address) as client:
            first.injected += 1
            token_ids: list[int] = []
            async for event in client.generate([1, 2], max_tokens=40, seed=3, tenant="acme", session_id="talk"):
                if hasattr(event, "usage"):
                    completion = event
                    break
                token_ids += event.token_ids
                if len(token_ids) == 7:
                    first.router.stop()
                    second.injected += 1
        expected = expected_tokens(NEXT, [1, 2], 3, 40)
        assert token_ids == list(completion.token_ids) == expected
        assert (completion.usage.resumes, completion.usage.generated_tokens) == (1, 40)
        assert callers == [[("acme", "talk")]] * 2
        await first._serving

    async def test_errors_are_typed(self, start: StartCluster) -> None:
        cluster = await start(engine())
        async with AsyncClient(cluster.address) as client:
            with pytest.raises(RequestRejected) as caught:
                await client.complete([1, 2], max_tokens=10_000)
            assert caught.value.reject_reason is RejectReason.INVALID
            assert "10000" in str(caught.value)
            cluster.injected += 1
            for caller in ({"tenant": "t" * 65}, {"session_id": "s" * 257}):
                with pytest.raises(RequestRejected, match=r"^x-(tenant|session-id) must be at most") as caught:
                    await client.complete([1, 2], max_tokens=5, **caller)
                assert caught.value.reject_reason is RejectReason.INVALID
                cluster.injected += 1
            with pytest.raises(RequestRejected, match="x-tenant must be printable ASCII"):
                await client.complete([1, 2], max_tokens=5, tenant="é")
            assert [m.name for m in await client.list_models()] == ["demo"]

    async def test_nobody_there_is_one_sentence(self, start: StartCluster) -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(RequestRejected, match=r"No router answers at 127\.0\.0\.1:1") as caught:
                await client.complete("x")
            assert caught.value.reject_reason is RejectReason.NO_ENDPOINT
            with pytest.raises(RequestRejected, match=r"within 0\.2 s"):
                await client.wait_ready(0.2)


async def test_leaving_a_raw_stream_midway_frees_the_engine(start: StartCluster) -> None:
    cluster = await start(engine(step_s=0.005))
    async with channel.open_channel(cluster.address) as opened:
        cluster.injected += 1
        await inference_pb2_grpc.InferenceStub(opened).Generate(request(200)).read()
    await eventually(lambda: not cluster.engines[0].running, "the engine is free")


class TestDrainingAQueue:
    """One place in the engine and one that waits there; the others queue in the router."""

    async def crowd(self, cluster: RouterCluster, max_tokens: int) -> list[asyncio.Task[str]]:
        async def end() -> str:
            try:
                answer = await cluster.generate(request(max_tokens))
            except grpc.aio.AioRpcError as error:
                code, reason, text, retry_after_s = from_rpc_error(error)
                assert text
                assert retry_after_s
                return f"{code.name} {reason}"
            assert answer.token_ids == expected_tokens(NEXT, [1, 2], 3, max_tokens)
            return "OK"

        cluster.engines[0].step_age_s = 0.1  # it stands still
        tasks = [asyncio.create_task(end()) for _ in range(6)]
        async with asyncio.timeout(10):
            while 'cluster_router_queued_requests{model="demo"} 4.0' not in await cluster.metrics():
                await asyncio.sleep(0.005)
        return tasks

    async def test_what_is_queued_is_served_while_there_is_time(self, start: StartCluster) -> None:
        cluster = await start(engine(max_num_seqs=1), max_queue_wait_s=60.0, drain_deadline_s=10.0)
        tasks = await self.crowd(cluster, 5)
        cluster.router.stop()
        await eventually(lambda: cluster.router.server._draining, "it drains")
        cluster.engines[0].step_age_s = 0.0
        cluster.engines[0]._work.set()
        assert await asyncio.gather(*tasks) == ["OK"] * 6
        assert await asyncio.wait_for(cluster._serving, 10) == 0

    async def test_what_is_queued_at_the_deadline_is_unavailable_at_once(self, start: StartCluster) -> None:
        cluster = await start(engine(max_num_seqs=1), max_queue_wait_s=60.0, drain_deadline_s=0.2)
        tasks = await self.crowd(cluster, 5)
        cluster.router.stop()
        assert await asyncio.gather(*tasks) == ["UNAVAILABLE DRAINING"] * 6
        assert await asyncio.wait_for(cluster._serving, 10) == 0


async def test_readiness_goes_before_the_first_refusal(start: StartCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await start(engine(step_s=0.01))
    health = health_pb2_grpc.HealthStub(cluster.channel)
    watching = health.Watch(health_pb2.HealthCheckRequest(service="cluster.v1.Inference"))
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
    server, seen = cluster.router.server, []
    drain = server.drain

    async def drain_later(deadline_s: float) -> None:
        seen.append((await watching.read()).status)  # a watcher has been told
        seen.append((await health.Check(health_pb2.HealthCheckRequest())).status)
        seen.append((await cluster.generate(request(3))).token_ids)  # and nobody is refused yet
        await drain(deadline_s)

    monkeypatch.setattr(type(server), "drain", lambda _, deadline_s: drain_later(deadline_s))
    cluster.router.stop()
    assert await asyncio.wait_for(cluster._serving, 10) == 0
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    assert seen == [not_serving, not_serving, expected_tokens(NEXT, [1, 2], 3, 3)]


async def test_a_burst_of_calls_reaches_the_router(start: StartCluster) -> None:
    """gRPC's own bound of calls that nobody has looked at would reset some, without a status of ours."""
    cluster = await start(engine())
    calls = [cluster.stub.ListModels(inference_pb2.ListModelsRequest(), timeout=20) for _ in range(2500)]
    assert all(len(answer.models) == 1 for answer in await asyncio.gather(*calls))
