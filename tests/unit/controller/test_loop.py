"""The loop with everything around it fake: what it asks of its parts, and what it tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from cluster.config.schema import MAX_DRAIN_S, ModelConfig
from cluster.controller import loop as loop_module
from cluster.controller import node_drain
from cluster.controller.actuator import Explanation
from cluster.controller.cluster_status import ProcessFacts
from cluster.controller.desired import DesiredModel
from cluster.controller.loop import ControllerLoop, Parts
from cluster.controller.server import ControlService
from cluster.controller.store import Store
from cluster.domain.clock import MonotonicClock
from cluster.domain.errors import ConfigError, NoFeasiblePlan, ReplicaError
from cluster.domain.ids import RankId, ReplicaId
from cluster.domain.replica import RankPhase
from cluster.telemetry.logs import get_logger
from cluster.telemetry.metrics import ControllerMetrics
from cluster.v1 import control_pb2
from tests.unit.controller.builders import SETTINGS, incarnation, model, report

FAST = SETTINGS.model_copy(update={"reconcile_interval_s": 0.02, "restart_backoff_s": 0.01})


class FakeActuator:
    """Remembers; a started incarnation lives until it is destroyed."""

    def __init__(self) -> None:
        self.alive: set = set()
        self.where: dict = {}
        self.orders: list = []
        self.destroyed: list = []
        self.swept: list = []
        self.ended: dict = {}
        self.refuse_start = ""
        self.fail_destroy = 0
        self.sweeping: asyncio.Event | None = None
        self.fail_sweep = self.fail_nodes = 0
        self.living = {"n0": "10.0.0.1", "n1": "10.0.0.2"}

    async def start(self, order, talk) -> None:
        """On the first node that is not draining; waits for one for ever."""
        self.orders.append(order)
        if self.refuse_start:
            raise ReplicaError(self.refuse_start)
        while not (free := [node_id for node_id in self.living if node_id not in talk.draining()]):
            talk.blocked("every node is draining")
            await asyncio.sleep(0.005)
        talk.blocked("")
        talk.placed(frozenset(free[:1]))
        self.where[order.incarnation] = free[0]
        self.alive.add(order.incarnation)
        self.ended[order.incarnation] = asyncio.get_running_loop().create_future()

    async def watch(self, incarnation) -> str:
        return await asyncio.shield(self.ended[incarnation])

    async def destroy(self, incarnation, world_size) -> None:
        if self.fail_destroy:
            self.fail_destroy -= 1
            raise ReplicaError("it does not die")
        self.destroyed.append((incarnation, world_size))
        self.alive.discard(incarnation)

    async def sweep(self, live, newest=None) -> None:
        if self.sweeping is not None:
            await self.sweeping.wait()
        if self.fail_sweep:
            self.fail_sweep -= 1
            raise ReplicaError("a node does not answer")
        self.swept.append((live, newest))

    async def nodes(self):
        if self.fail_nodes:
            self.fail_nodes -= 1
            raise ReplicaError("Ray is away")
        return dict(self.living)


class FakePlanner:
    def __init__(self) -> None:
        self.asked: list = []

    async def plan(self, config, kept) -> DesiredModel:
        self.asked.append((config.name, [m.name for m in kept]))
        if "huge" in config.model:
            raise NoFeasiblePlan("huge does not fit")
        return model(config=config, replicas=config.replicas)

    async def explain(self, config, kept) -> Explanation:
        return Explanation(True, config.name, "{}")


class Bench:
    def __init__(self, tmp_path) -> None:
        self.tmp_path = tmp_path
        self.actuator, self.planner = FakeActuator(), FakePlanner()
        self.begin()

    def begin(self) -> None:
        store = self.store = Store(self.tmp_path)
        self.registry = CollectorRegistry()
        parts = Parts(
            "c", FAST, store, self.actuator, self.planner, MonotonicClock(), ControllerMetrics(self.registry),
            get_logger(),
        )  # fmt: skip
        self.loop = ControllerLoop(parts, store.begin_life())
        self.loop.control_address = "127.0.0.1:1"
        self.running = asyncio.ensure_future(self.loop.run())

    async def end(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)

    async def until(self, what, deadline_s: float = 5.0) -> None:
        async def poll() -> None:
            while not what():
                assert not self.running.done(), self.running
                await asyncio.sleep(0.005)

        await asyncio.wait_for(poll(), deadline_s)

    def speak(self, who, phase=RankPhase.READY, **changes) -> None:
        for rank in range(2):
            where = {"node_id": self.actuator.where.get(who, "n0"), **changes}
            self.loop.take_report(report(who, rank, phase, **where), (who, rank))

    async def ready(self, who) -> None:
        await self.until(lambda: who in self.actuator.alive)
        self.speak(who)
        await self.until(lambda: (who.replica.slot, who.generation) in self.serving())

    def serving(self) -> list[tuple[int, int]]:
        return [(r.slot, r.generation) for r in self.loop.status().replicas if r.phase == "READY"]


@pytest.fixture
async def bench(tmp_path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    await made.end()


A = ModelConfig(model="/models/m")


async def test_from_apply_to_ready(bench):
    (planned,) = await bench.loop.apply((A,))
    assert planned.name == "m"
    await bench.ready(incarnation())
    (order,) = bench.actuator.orders
    assert order.control_address == "127.0.0.1:1"
    assert order.total_ranks == 2
    assert len(order.port_candidates) == 8


async def test_the_generation_is_durable_before_anything_acts(bench):
    seen = []
    start = bench.actuator.start

    async def look(order, talk):
        seen.append(Store(bench.tmp_path).load().slots[order.incarnation.replica].generation)
        await start(order, talk)

    bench.actuator.start = look
    await bench.loop.apply((A,))
    await bench.until(lambda: seen)
    assert seen == [1]


async def test_a_process_that_ends_before_it_ever_reported_fails_its_replica(bench):
    await bench.loop.apply((A,))
    await bench.until(lambda: incarnation() in bench.actuator.alive)
    bench.actuator.ended[incarnation()].set_result("dead: rank 0's process ended")
    await bench.ready(incarnation(generation=2))
    assert bench.actuator.destroyed == [(incarnation(), 2)]
    ports = [set(order.port_candidates) for order in bench.actuator.orders]
    assert not ports[0] & ports[1]


async def test_a_start_that_fails_is_tried_again(bench):
    bench.actuator.refuse_start = "no such thing"
    await bench.loop.apply((A,))
    await bench.until(lambda: len(bench.actuator.orders) >= 2)
    bench.actuator.refuse_start = ""
    await bench.until(lambda: bool(bench.actuator.alive))


async def test_an_apply_ends_the_pause_after_a_failure(bench, monkeypatch):
    monkeypatch.setattr("cluster.controller.reconcile.backoff_s", lambda failures, settings: 3600.0)
    bench.actuator.refuse_start = "a.safetensors is damaged"
    await bench.loop.apply((A,))
    await bench.until(lambda: "starts again in" in bench.loop.status().models[0].blocked_reason)
    bench.actuator.refuse_start = ""
    await bench.loop.apply((A,))
    await bench.ready(incarnation(generation=2))


async def test_a_broken_stream_rebuilds_at_once(bench):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    bench.loop.rank_stream_ended(RankId(incarnation(), 1), (incarnation(), 1))
    await bench.ready(incarnation(generation=2))


async def test_remains_that_do_not_die_are_never_doubled(bench):
    bench.actuator.fail_destroy = 1
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    bench.loop.rank_stream_ended(RankId(incarnation(), 1), (incarnation(), 1))
    await bench.until(lambda: bench.actuator.fail_destroy == 0)
    await asyncio.sleep(0.1)
    assert bench.actuator.alive == {incarnation()}
    assert len(bench.actuator.orders) == 1


async def test_those_scaled_away_leave_the_status_the_metrics_and_memory(bench, monkeypatch):
    monkeypatch.setattr(bench.loop, "_settings", FAST.model_copy(update={"drain_deadline_s": 0.0}))
    await bench.loop.apply((A.model_copy(update={"replicas": 40}),))
    await bench.until(lambda: len(bench.actuator.alive) == 40)
    await bench.ready(incarnation(39))
    await bench.loop.scale(A.name, 1)
    await bench.until(lambda: [r.slot for r in bench.loop.status().replicas] == [39], 10)
    assert len(bench.loop._fleet.observed().replicas) == 1
    assert len(replicas_shown(bench)) >= 1
    await bench.loop.scale(A.name, 0)
    await bench.until(lambda: not bench.loop.status().replicas, 10)
    assert bench.loop._fleet._streams == {}
    await bench.until(lambda: not replicas_shown(bench))


def replicas_shown(bench) -> list[str]:
    samples = (s for family in bench.registry.collect() for s in family.samples)
    return [s.labels["replica"] for s in samples if "replica" in s.labels]


async def test_a_refused_model_changes_nothing(bench):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    with pytest.raises(NoFeasiblePlan):
        await bench.loop.apply((A.model_copy(update={"replicas": 3}), ModelConfig(model="/models/huge")))
    assert [(m.name, m.desired_replicas) for m in bench.loop.status().models] == [("m", 1)]
    assert bench.serving() == [(0, 1)]


async def test_models_that_ask_the_same_are_not_planned_again(bench):
    await bench.loop.apply((A,))
    await bench.loop.apply((A.model_copy(update={"replicas": 2}), ModelConfig(model="/models/b")))
    assert bench.planner.asked == [("m", []), ("b", ["m"])]
    assert [m.desired_replicas for m in bench.loop.status().models] == [2, 1]


async def test_two_models_of_one_name_are_refused(bench):
    with pytest.raises(ConfigError, match="served_model_name"):
        await bench.loop.apply((A, ModelConfig(model="/elsewhere/m")))


async def test_scaling_an_unknown_model_names_those_there_are(bench):
    await bench.loop.apply((A,))
    with pytest.raises(ConfigError, match="served are: m"):
        await bench.loop.scale("x", 2)


async def test_only_a_ready_replica_can_be_drained(bench):
    with pytest.raises(ConfigError, match="unknown"):
        await bench.loop.drain(ReplicaId("m", 0), 1.0)


async def test_a_drained_node_is_empty_when_the_answer_comes_and_its_replica_is_elsewhere(bench):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    draining = asyncio.ensure_future(bench.loop.drain_node("10.0.0.1", 0.0))
    await bench.ready(incarnation(slot=1))  # its slot is taken until it is gone, so another one
    await asyncio.wait_for(draining, 5)
    assert bench.actuator.alive == {incarnation(slot=1)}
    assert bench.actuator.where[incarnation(slot=1)] == "n1"
    assert bench.serving() == [(1, 1)]


async def test_a_replica_that_loads_on_a_draining_node_is_ended_at_once(bench):
    await bench.loop.apply((A,))
    await bench.until(lambda: incarnation() in bench.actuator.alive)
    bench.speak(incarnation(), RankPhase.LOADING)
    await asyncio.wait_for(bench.loop.drain_node("10.0.0.1", 3600.0), 5)
    assert incarnation() not in bench.actuator.alive


async def test_with_no_room_elsewhere_status_says_that_the_node_is_draining(bench):
    bench.actuator.living = {"n0": "10.0.0.1"}
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    await asyncio.wait_for(bench.loop.drain_node("10.0.0.1", 0.0), 5)
    await bench.until(lambda: "draining" in bench.loop.status().models[0].blocked_reason)


async def test_a_node_that_left_is_forgotten_and_one_that_comes_back_is_used(bench, monkeypatch):
    monkeypatch.setattr(node_drain, "LEFT_POLL_S", 0.01)
    bench.actuator.living = {"n0": "10.0.0.1"}
    await bench.loop.drain_node("10.0.0.1", 0.0)
    await bench.loop.apply((A,))
    await bench.until(lambda: bool(bench.actuator.orders))
    assert not bench.actuator.alive
    bench.actuator.living = {"n9": "10.0.0.1"}
    await bench.ready(incarnation())
    await bench.until(lambda: not bench.loop._fleet.draining())


async def test_an_unknown_node_is_refused_with_those_there_are(bench):
    with pytest.raises(ConfigError, match=r"'10\.0\.0\.9'; nodes are: 10\.0\.0\.1, 10\.0\.0\.2"):
        await bench.loop.drain_node("10.0.0.9", 0.0)


async def test_a_node_that_does_not_get_empty_is_an_error(bench, monkeypatch):
    monkeypatch.setattr(node_drain, "MARGIN_S", 0.1)
    bench.actuator.fail_destroy = 1000
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    with pytest.raises(ReplicaError, match="is not empty: m/0#1"):
        await asyncio.wait_for(bench.loop.drain_node("10.0.0.1", 0.0), 5)


async def test_a_node_can_be_drained_while_everything_shuts_down(bench):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    ending = asyncio.ensure_future(bench.loop.shutdown(0.0))
    await asyncio.sleep(0)
    await asyncio.wait_for(bench.loop.drain_node("10.0.0.1", 0.0), 5)
    await asyncio.wait_for(ending, 5)
    assert not bench.actuator.alive


async def test_a_shutdown_does_not_wait_for_what_a_drain_has_promised(bench, monkeypatch):
    monkeypatch.setattr(loop_module, "SHUTDOWN_MARGIN_S", 2.0)
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    draining = asyncio.ensure_future(bench.loop.drain_node("10.0.0.1", 3600.0))
    await bench.until(lambda: bench.loop.status().replicas[0].phase == "DRAINING")
    await asyncio.wait_for(bench.loop.shutdown(0.0), 5)
    await asyncio.wait_for(draining, 5)
    assert not bench.actuator.alive
    assert Store(bench.tmp_path).load().draining == {}, "what comes next begins anew"


async def test_a_restarted_controller_calls_no_node_empty_before_its_ranks_may_have_reported(bench):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    await bench.end()
    bench.begin()
    draining = asyncio.ensure_future(bench.loop.drain_node("10.0.0.1", 3600.0))
    await asyncio.sleep(2 * node_drain.WAIT_POLL_S)
    assert not draining.done()
    bench.loop.take_report(report(incarnation(), 0), 0)
    await asyncio.sleep(2 * node_drain.WAIT_POLL_S)
    assert incarnation() in bench.actuator.alive, "its second rank has not reported: it may serve"
    bench.loop.take_report(report(incarnation(), 1), 1)
    await bench.until(lambda: "DRAINING" in [r.phase for r in bench.loop.status().replicas])
    draining.cancel()


async def test_the_drain_of_a_node_is_a_call(bench):
    answer = await ControlService(bench.loop, lambda: None).DrainNode(
        control_pb2.DrainNodeRequest(node="10.0.0.2", deadline_s=0), context=None
    )
    assert answer == control_pb2.DrainNodeResponse()
    assert bench.loop._fleet.draining() == {"n1": "10.0.0.2"}


class Context:
    async def abort_with_status(self, status) -> None:
        raise ConfigError(status.details)


@pytest.mark.parametrize("deadline_s", [6554.0, MAX_DRAIN_S, MAX_DRAIN_S + 1])
async def test_a_drain_may_take_as_long_as_a_long_generation_but_no_longer_than_a_day(bench, deadline_s):
    call = ControlService(bench.loop, lambda: None).DrainNode(
        control_pb2.DrainNodeRequest(node="10.0.0.2", deadline_s=deadline_s), Context()
    )
    if deadline_s <= MAX_DRAIN_S:
        assert await call == control_pb2.DrainNodeResponse()
    else:
        with pytest.raises(ConfigError, match=r"deadline_s is 86401\.0; give 0 to 86400 seconds"):
            await call


async def test_a_drained_node_stays_closed_when_the_controller_is_restarted(bench, monkeypatch):
    monkeypatch.setattr(node_drain, "LEFT_POLL_S", 0.01)
    await bench.loop.drain_node("10.0.0.1", 0.0)
    await bench.end()
    bench.begin()
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    assert bench.actuator.where[incarnation()] == "n1"
    bench.actuator.living = {"n1": "10.0.0.2"}
    await bench.until(lambda: Store(bench.tmp_path).load().draining == {})


async def test_a_full_disk_does_not_keep_a_node_from_being_emptied(bench, monkeypatch):
    FullDisk(monkeypatch, bench.store).left = 1
    await asyncio.wait_for(bench.loop.drain_node("10.0.0.1", 0.0), 5)
    assert bench.loop._fleet.draining() == {"n0": "10.0.0.1"}


async def test_nodes_that_cannot_be_asked_for_a_while_are_asked_again(bench, monkeypatch):
    monkeypatch.setattr(node_drain, "LEFT_POLL_S", 0.01)
    await bench.loop.drain_node("10.0.0.1", 0.0)
    bench.actuator.fail_nodes = 3
    bench.actuator.living = {}
    await bench.until(lambda: not bench.loop._fleet.draining())
    assert bench.actuator.fail_nodes == 0


async def test_routers_hear_every_table_and_are_processes_meanwhile(bench):
    await bench.loop.apply((A,))
    tables = bench.loop.watch_endpoints(ProcessFacts("router", 7, "h"))
    first = await anext(tables)
    assert first.endpoints == ()
    await bench.ready(incarnation())
    second = await asyncio.wait_for(anext(tables), 5)
    assert [e.incarnation for e in second.endpoints] == [incarnation()]
    assert second.epoch > first.epoch
    assert [p.kind for p in bench.loop.status().processes] == ["router", "rank", "rank"]
    await tables.aclose()
    assert [p.kind for p in bench.loop.status().processes] == ["rank", "rank"]


async def test_a_restarted_loop_adopts_and_says_nothing_before_it_has(bench):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    epoch = bench.loop.status().epoch
    await bench.end()
    bench.begin()
    tables = bench.loop.watch_endpoints(ProcessFacts("router", 7, "h"))
    waiting = asyncio.ensure_future(anext(tables))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    bench.speak(incarnation())
    table = await asyncio.wait_for(waiting, 5)
    assert [e.incarnation for e in table.endpoints] == [incarnation()]
    assert table.epoch > epoch
    assert len(bench.actuator.orders) == 1
    await bench.until(lambda: bench.actuator.swept[-1] == ({incarnation()}, {incarnation()}))
    await tables.aclose()


async def test_shutdown_ends_everything_and_refuses_more(bench):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    await asyncio.wait_for(bench.loop.shutdown(0.0), 5)
    assert not bench.actuator.alive
    assert bench.actuator.swept[-1] == (frozenset(), None)
    with pytest.raises(ReplicaError, match="shutting down"):
        await bench.loop.apply((A,))
    assert Store(bench.tmp_path).load().desired == ()


class FullDisk:
    """A store that refuses so many saves."""

    def __init__(self, monkeypatch, store: Store) -> None:
        self.left = 0
        save = store.save

        def refuse(state) -> None:
            if self.left:
                self.left -= 1
                raise OSError(28, "No space left on device")
            save(state)

        monkeypatch.setattr(store, "save", refuse)


async def test_a_start_that_cannot_be_saved_is_tried_again_at_once(bench, monkeypatch):
    disk = FullDisk(monkeypatch, bench.store)
    await bench.loop.apply((A,))
    disk.left = 2
    await bench.ready(incarnation())
    assert disk.left == 0
    assert [order.incarnation for order in bench.actuator.orders] == [incarnation()]


async def test_what_cannot_be_saved_is_not_desired(bench, monkeypatch):
    FullDisk(monkeypatch, bench.store).left = 1
    with pytest.raises(ReplicaError, match="cannot be saved"):
        await bench.loop.apply((A,))
    assert not bench.loop.status().models


async def test_a_full_disk_does_not_keep_a_cluster_from_being_stopped(bench, monkeypatch):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    FullDisk(monkeypatch, bench.store).left = 1
    await asyncio.wait_for(bench.loop.shutdown(0.0), 5)
    assert not bench.actuator.alive


async def test_a_node_that_cannot_be_swept_holds_nobody_up(bench, monkeypatch):
    monkeypatch.setattr(loop_module, "SWEEP_RETRY_S", 0.01)
    await bench.end()
    bench.actuator.swept, bench.actuator.sweeping, bench.actuator.fail_sweep = [], asyncio.Event(), 2
    bench.begin()
    await bench.loop.apply((A,))
    tables = bench.loop.watch_endpoints(ProcessFacts("router", 7, "h"))
    await asyncio.wait_for(anext(tables), 5)
    await bench.ready(incarnation())
    assert not bench.actuator.swept
    bench.actuator.sweeping.set()
    await bench.until(lambda: bool(bench.actuator.swept))
    await tables.aclose()


async def test_every_scrape_finds_every_series(bench, monkeypatch):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    cleared = []
    monkeypatch.setattr(Gauge, "clear", cleared.append)  # a scrape may come right after it
    await asyncio.sleep(0.1)
    assert cleared == []
    assert bench.registry.get_sample_value("cluster_replicas", {"model": "m", "phase": "READY"}) == 1
    await bench.loop.apply(())
    assert bench.registry.get_sample_value("cluster_replicas", {"model": "m", "phase": "READY"}) is None


async def test_a_shutdown_ends_the_process_though_nobody_waits_for_the_answer(bench):
    await bench.loop.apply((A,))
    await bench.ready(incarnation())
    ended = asyncio.Event()
    call = asyncio.ensure_future(
        ControlService(bench.loop, ended.set).Shutdown(control_pb2.ShutdownRequest(), context=None)
    )
    await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.wait_for(ended.wait(), 5)
    assert not bench.actuator.alive


async def test_failures_in_a_row_are_told(bench):
    await bench.loop.apply((A,))
    await bench.until(lambda: incarnation() in bench.actuator.alive)
    bench.actuator.ended[incarnation()].set_result("dead: rank 0's process ended")
    await bench.ready(incarnation(generation=2))
    assert [r.failures_in_a_row for r in bench.loop.status().replicas] == [1]


async def test_every_table_names_the_state_it_counts_in(bench):
    tables = bench.loop.watch_endpoints(ProcessFacts("router", 7, "h"))
    table = await asyncio.wait_for(anext(tables), 5)
    assert table.state_id == bench.store.load().state_id != ""
    await tables.aclose()
