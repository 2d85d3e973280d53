"""The composition root with Ray, controller and router fake: what is refused, and what a failed start ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from cluster import assembly, router_process
from cluster.client.control import ControllerUnreachable
from cluster.client.local_cluster import LocalCluster, load_local, remember
from cluster.config.process_identity import started_s
from cluster.config.run_dir import hold_run_dir
from cluster.config.schema import ClusterConfig, ModelConfig, RouterConfig
from cluster.controller import controller_actor, ray_start
from cluster.controller.node_options import NodeOptions
from cluster.controller.ray_start import RayNode
from cluster.domain.errors import ConfigError, NoFeasiblePlan, ReplicaError
from tests.unit.controller.builders import inventory, node

SLEEP = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
DEMO = ClusterConfig(models=(ModelConfig(model="demo"),), router=RouterConfig(port=0))


class World:
    """What the composition root reaches for; ``done`` is the story of what it did."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.found: str | None = None  # a controller of our name that was there before
        self.serves: tuple[str, ...] = ()
        self.answers = True
        self.refuse: dict[str, Exception] = {}

    def step(self, name: str) -> None:
        self.done.append(name)
        if name in self.refuse:
            raise self.refuse[name]

    def start_head(self, run_dir, **_) -> RayNode:
        self.step("ray")
        return RayNode("127.0.0.1:6379", "token", ())

    def start_controller(self, config, run_dir, **_) -> str:
        self.step("controller")
        return "127.0.0.1:50052"

    def control(self, address: str) -> Control:
        return Control(self)


class Control:
    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_) -> None:
        return

    def status(self):
        if not self.world.answers:
            raise ControllerUnreachable("nobody")
        return SimpleNamespace(models=[SimpleNamespace(name=name) for name in self.world.serves])

    def apply(self, models) -> None:
        self.world.step("apply")

    def shut_down(self, drain_s: float) -> None:
        self.world.step(f"shut down within {drain_s:g}")


@pytest.fixture
def world(monkeypatch) -> World:
    made = World()
    monkeypatch.setattr(ray_start, "start_head", made.start_head)
    monkeypatch.setattr(ray_start, "start_worker", lambda *_, **__: made.step("worker"))
    monkeypatch.setattr(ray_start, "connect", lambda *_, **kw: made.step(f"connect {kw.get('token_file')}"))
    monkeypatch.setattr(ray_start, "disconnect", lambda: made.step("disconnect"))
    monkeypatch.setattr(ray_start, "stop_node", lambda _, orphans=None: made.step(f"stop ray, sweep {bool(orphans)}"))
    monkeypatch.setattr(controller_actor, "start_controller", made.start_controller)
    monkeypatch.setattr(controller_actor, "find_controller", lambda _: made.found)
    monkeypatch.setattr(controller_actor, "end_controller", lambda name: made.step(f"kill {name}"))
    monkeypatch.setattr(assembly, "ControlClient", made.control)
    monkeypatch.setattr(assembly, "start_router", lambda *_, **__: made.step("router"))
    return made


def start(run_dir, address=None, config=DEMO, token_file=None):
    return assembly.start_cluster(config, run_dir, address, lambda _: None, token_file)


@pytest.fixture
def living():
    """A process that stands for one that was started, and its start time."""
    child = subprocess.Popen(SLEEP, stdin=subprocess.PIPE)
    yield child.pid, started_s(psutil.Process(child.pid))
    child.kill()
    child.communicate()


def record(run_dir, pid: int, started: float, **changes) -> LocalCluster:
    facts = {
        "cluster_name": "c", "rank_ports": [20000, 23999], "control_address": "127.0.0.1:1",
        "router_address": "127.0.0.1:2", "router_pid": pid, "router_started_s": started, "ray_address": "127.0.0.1:3",
        "owns_ray": True, **changes,
    }  # fmt: skip
    remember(run_dir, LocalCluster(**facts))
    return load_local(run_dir)


# ---- a run directory is one cluster's ----


@pytest.mark.parametrize(
    "begin",
    [
        lambda run_dir: start(run_dir),
        lambda run_dir: assembly.start_head(DEMO, run_dir, 6379, 1, lambda _: None),
        lambda run_dir: assembly.run_worker(
            NodeOptions("10.0.0.1:6379", "10.0.0.2", 1), run_dir, threading.Event(), lambda _: None, lambda _: None
        ),
    ],
    ids=["serve", "controller", "worker"],
)
def test_nothing_is_started_or_ended_beside_a_node_that_lives(world, tmp_path, living, begin):
    ray_start._save(tmp_path, RayNode("127.0.0.1:1", "t", (living,)))  # and no cluster.json yet: it is still starting
    with pytest.raises(ConfigError, match=r"runs under .* already"):
        begin(tmp_path)
    assert world.done == []
    assert ray_start.load_node(tmp_path) is not None


def test_a_cluster_whose_controller_answers_is_not_touched(world, tmp_path):
    record(tmp_path, 2**22 + 1, 0.0)
    with pytest.raises(ConfigError, match=r"runs under .* already"):
        start(tmp_path)
    assert world.done == []


def test_a_cluster_whose_controller_is_away_for_a_moment_is_not_touched(world, tmp_path, living):
    world.answers = False
    record(tmp_path, *living)
    with pytest.raises(ConfigError, match=r"runs under .* already"):
        start(tmp_path)
    assert world.done == []


def test_the_remains_of_a_cluster_that_died_are_removed(world, tmp_path):
    world.answers = False
    record(tmp_path, 2**22 + 1, 0.0)
    start(tmp_path)
    assert world.done[:2] == ["shut down within 0", "stop ray, sweep True"]
    assert "router" in world.done


def test_one_process_at_a_time_works_under_a_run_directory(tmp_path):
    with hold_run_dir(tmp_path):
        holder = hold_run_dir(tmp_path)
        with pytest.raises(ConfigError, match="Another llm-cluster process"):
            holder.__enter__()
    with hold_run_dir(tmp_path):
        assert (tmp_path / "lock").exists()


# ---- a failed start ends what it began, and nothing else ----


@pytest.mark.parametrize("asked", [{"tensor_parallel_size": 4096}, {"max_model_len": 1 << 20}, {"replicas": 10_000}])
def test_what_cannot_be_is_refused_before_ray_is_started(world, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(assembly, "this_machine", lambda slots, host: inventory(node(host, min(slots, 64))))
    config = DEMO.model_copy(update={"models": (ModelConfig(model="demo", **asked),)})
    with pytest.raises((ConfigError, NoFeasiblePlan)):
        start(tmp_path, config=config)
    assert world.done == []


def test_a_cpu_slot_is_there_for_every_rank_that_is_asked_for():
    wide = ModelConfig(model="demo", replicas=20, tensor_parallel_size=4, pipeline_parallel_size=3)
    small = ModelConfig(model="demo", replicas=300, served_model_name="small")
    assert assembly.cpu_slots(ClusterConfig(models=(wide, small))) == 540


def test_a_refused_model_takes_our_ray_down(world, tmp_path):
    world.refuse["apply"] = ConfigError("no")
    with pytest.raises(ConfigError, match="no"):
        start(tmp_path)
    assert world.done[-2:] == ["disconnect", "stop ray, sweep True"]


def test_a_ray_that_did_not_start_is_not_stopped(world, tmp_path):
    world.refuse["ray"] = ConfigError("no")
    with pytest.raises(ConfigError, match="no"):
        start(tmp_path)
    assert world.done == ["ray"]


def test_a_controller_port_that_is_taken_takes_only_our_ray_down(world, tmp_path):
    world.refuse["controller"] = ConfigError("taken")
    with pytest.raises(ConfigError, match="taken"):
        assembly.start_head(DEMO, tmp_path, 6379, 1, lambda _: None)
    assert world.done == ["ray", "connect token", "controller", "disconnect", "stop ray, sweep True"]


def test_stopping_a_head_sweeps_what_is_left(world, tmp_path):
    head = assembly.start_head(DEMO, tmp_path, 6379, 1, lambda _: None)
    assembly.stop_head(head, tmp_path, 1.0, lambda _: None)
    assert world.done[-2:] == ["shut down within 1", "stop ray, sweep True"]


# ---- in a Ray cluster that is not ours ----


def test_the_controller_that_a_failed_start_made_is_ended(world, tmp_path):
    world.refuse["router"] = ReplicaError("no")
    with pytest.raises(ReplicaError, match="no"):
        start(tmp_path, "10.0.0.1:6379", token_file=tmp_path / "token")
    assert world.done[0] == f"connect {tmp_path / 'token'}"
    assert world.done[-2:] == ["shut down within 0", "disconnect"]
    assert not any("stop ray" in step for step in world.done)


def test_one_that_does_not_end_itself_is_killed(world, tmp_path):
    world.refuse = {"apply": ConfigError("no"), "shut down within 0": ReplicaError("it does not")}
    with pytest.raises(ConfigError, match="no"):
        start(tmp_path, "10.0.0.1:6379")
    assert "kill llm-cluster" in world.done


def test_somebody_elses_models_are_not_replaced(world, tmp_path):
    world.found, world.serves = "10.0.0.1:50052", ("theirs",)
    with pytest.raises(ConfigError, match="serves theirs already; choose another --cluster-name"):
        start(tmp_path, "10.0.0.1:6379")
    assert world.done == ["connect None", "disconnect"]


def test_an_idle_controller_of_our_name_is_used_and_survives_a_refusal(world, tmp_path):
    world.found = "10.0.0.1:50052"
    world.refuse["apply"] = ConfigError("no")
    with pytest.raises(ConfigError, match="no"):
        start(tmp_path, "10.0.0.1:6379")
    assert not any(step.startswith(("controller", "shut down", "kill")) for step in world.done)


# ---- stop ----


@pytest.mark.parametrize(
    ("asked", "router_s", "waits_s"), [(None, 120.0, 130.0), (5.0, 30.0, 15.0), (300.0, 30.0, 40.0)]
)
def test_stop_waits_as_long_as_the_router_drains(world, tmp_path, living, monkeypatch, asked, router_s, waits_s):
    waited = []

    def end(_, deadline_s):
        waited.append((deadline_s, load_local(tmp_path).stopping))

    monkeypatch.setattr(router_process, "end", end)
    record(tmp_path, *living, router_drain_s=router_s)
    assembly.stop_cluster(tmp_path, asked, lambda _: None)
    assert waited == [(waits_s, True)], "whoever watches over the router knows by then"
    assert load_local(tmp_path) is None


def test_a_process_that_ignores_us_is_gone_when_stop_returns(tmp_path):
    script = "import signal, sys; signal.signal(15, signal.SIG_IGN); print('up', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"up\n"
    router_process.end(psutil.Process(child.pid), 0.05)
    assert not psutil.pid_exists(child.pid) or psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    child.communicate()


def test_a_node_that_its_command_left_behind_can_be_stopped(world, tmp_path, living):
    ray_start._save(tmp_path, RayNode("127.0.0.1:1", "t", (living,)))
    with hold_run_dir(tmp_path), pytest.raises(ConfigError, match="Another llm-cluster process"):
        assembly.stop_cluster(tmp_path, None, lambda _: None)
    assembly.stop_cluster(tmp_path, None, lambda _: None)
    assert world.done == ["stop ray, sweep True"]


def test_there_is_nothing_to_stop(tmp_path):
    with pytest.raises(ConfigError, match="No cluster runs"):
        assembly.stop_cluster(tmp_path, None, lambda _: None)


def test_a_router_is_started_again_where_clients_know_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(assembly, "start_router", lambda config, *_, **kw: asked.append((config.router.port, kw)))
    assembly.restart_router(DEMO, tmp_path, record(tmp_path, 1, 0.0, router_address="127.0.0.1:45678"))
    ((port, given),) = asked
    assert (port, given["owns_ray"], given["wanted"]()) == (45678, True, True)
    remember(tmp_path, replace(load_local(tmp_path), stopping=True))
    assert not given["wanted"]()


def test_a_router_that_nobody_wants_any_more_is_ended_again(tmp_path, monkeypatch):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(router_process, "spawn", lambda *_: (child, {"grpc": 1, "metrics": 2}))
    with pytest.raises(ReplicaError, match="being stopped"):
        assembly.start_router(DEMO, tmp_path, "127.0.0.1:1", "127.0.0.1:2", owns_ray=True, wanted=lambda: False)
    child.communicate(timeout=10)
    assert load_local(tmp_path) is None


def test_the_configs_models_are_applied_with_what_is_wrong_said(world, tmp_path):
    head = assembly.start_head(DEMO, tmp_path, 6379, 1, lambda _: None)
    world.refuse["apply"] = NoFeasiblePlan("no room")
    with pytest.raises(NoFeasiblePlan, match="no room"):
        assembly.apply_models(head, DEMO.models)
    del world.refuse["apply"]
    before = world.done.count("apply")
    assembly.apply_models(head, ())
    assert world.done.count("apply") == before + 1, "no models is a wish too"
