"""What a generation serves: another digest for other weights or another way of loading them, and who is told of it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from prometheus_client import CollectorRegistry

from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.manifest import write_manifest
from cluster.checkpoint.resolve import demo_path
from cluster.config.schema import ModelConfig
from cluster.controller import ray_actuator
from cluster.controller.actuator import StartOrder
from cluster.controller.checkpoint_planner import CheckpointPlanner
from cluster.controller.desired import DesiredModel, model_from_json, model_to_json
from cluster.controller.endpoints import endpoint_table
from cluster.controller.messages import report_from_message
from cluster.controller.placement import place_replica
from cluster.controller.rank_specs import ClusterFacts, HostFacts
from cluster.controller.ray_actuator import RayActuator
from cluster.controller.ray_observer import RayCalls
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.controller.served_digest import served_digest, weights_seen
from cluster.domain.clock import ManualClock
from cluster.domain.endpoint import EndpointTable, LoadSnapshot
from cluster.domain.errors import ReplicaError
from cluster.domain.model_spec import Dtype
from cluster.domain.parallel_layout import ParallelLayout, Placement
from cluster.domain.replica import RankPhase
from cluster.engine.heartbeat import Heartbeat
from cluster.engine.leader import EngineServicer
from cluster.engine.model_card import identity, model_card
from cluster.engine.progress import RankProgress
from cluster.engine.rank_spec import RankSpec
from cluster.engine.sessions import Sessions
from cluster.router.handshake import HandshakeRefused, check_welcome
from cluster.telemetry.metrics import RankMetrics
from cluster.v1 import engine_pb2
from cluster.wire.convert import identity_of
from tests.unit.controller.builders import SETTINGS, fleet, incarnation, inventory, model, node

INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_path(), tmp_path / "tuned"))


def planned(folder: Path | str, **options: Any) -> DesiredModel:
    planner = CheckpointPlanner(lambda _: inventory(node("a", 8)))
    return planner.plan_now(ModelConfig(model=str(folder), tensor_parallel_size=2, **options), ())


def digest_of(wanted: DesiredModel) -> str:
    return served_digest(wanted, weights_seen(wanted))


def overwrite(file: Path) -> None:
    """With other weights of the same size, in the same header."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def manifest(folder: Path) -> None:
    write_manifest(folder, read_checkpoint(folder).files, lambda _done, _total: None)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"rope_scaling": "linear:2"}, {"load_format": "dummy"}],
    ids=lambda o: next(iter(o)),
)
def test_other_ways_of_loading_the_same_files_are_served_apart(folder: Path, options: dict[str, Any]) -> None:
    assert digest_of(planned(folder, **options)) != digest_of(planned(folder))


def test_dummy_weights_of_another_seed_are_others(folder: Path) -> None:
    one, other = (planned(folder, load_format="dummy", seed=seed) for seed in (1, 2))
    assert digest_of(one) != digest_of(other)


def test_files_elsewhere_are_others_however_alike_they_look(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other", copy_function=shutil.copy2))
    here, there = planned(folder), planned(other)
    assert here.checkpoint_digest == there.checkpoint_digest, "headers do not tell them apart"
    assert weights_seen(here) == weights_seen(there)
    assert digest_of(here) != digest_of(there)


def test_another_commit_or_repository_is_another(folder: Path) -> None:
    first = replace(planned(folder), checkpoint_path="org/tuned", revision="c" * 40)
    others = replace(first, revision="d" * 40), replace(first, checkpoint_path="org/other")
    assert len({digest_of(wanted) for wanted in (first, *others)}) == 3


def test_weights_that_were_overwritten_are_others(folder: Path) -> None:
    wanted = planned(folder)
    before = digest_of(wanted)
    overwrite(folder / SHARD)
    assert planned(folder) == wanted, "a plan does not tell"
    assert digest_of(wanted) != before


def test_a_manifest_tells_the_weights_whenever_they_were_copied(folder: Path) -> None:
    wanted = planned(folder)
    unproved = digest_of(wanted)
    manifest(folder)
    proved = digest_of(wanted)
    assert proved != unproved
    os.utime(folder / SHARD, ns=(1, 1))
    assert digest_of(wanted) == proved
    overwrite(folder / SHARD)
    manifest(folder)
    assert digest_of(wanted) != proved


def test_files_that_are_not_weights_do_not_count(folder: Path) -> None:
    wanted = planned(folder)
    before = digest_of(wanted)
    for name in ("README.md", "consolidated.safetensors"):
        (folder / name).write_text("anything")
    assert digest_of(wanted) == before


def test_nothing_is_looked_at_where_nothing_can_change(folder: Path) -> None:
    assert weights_seen(replace(planned(folder), checkpoint_path="org/tuned", revision="c" * 40)) == ""
    assert weights_seen(planned(folder, load_format="dummy")) == ""


@pytest.mark.parametrize("lost", [SHARD, INDEX, "."])
def test_a_controller_that_has_lost_the_files_says_so_and_ranks_may_start(folder: Path, lost: str) -> None:
    wanted = planned(folder)
    before = digest_of(wanted)
    shutil.rmtree(folder) if lost == "." else (folder / lost).unlink()
    assert weights_seen(wanted) == "unseen"
    assert digest_of(wanted) != before


def test_restarts_and_scaling_change_nothing(folder: Path) -> None:
    """Nor does a restarted controller, which has the stored plan, or what only limits what is served."""
    wanted = planned(folder)
    same = [
        wanted, wanted.scaled(7), model_from_json(model_to_json(wanted)), planned(folder), planned(folder, replicas=3),
        planned(folder, max_num_seqs=3, max_model_len=64, served_model_name="other"),
    ]  # fmt: skip
    assert {digest_of(one) for one in same} == {digest_of(wanted)}


# ---- who is told ----


class Rank:
    """A rank's actor, answering at once."""

    def __init__(self, launched: list[RankSpec]) -> None:
        facts = HostFacts(1, 4, tuple(range(20000, 20012)))
        self.prepare = self._method(lambda *_: facts)
        self.hold = self._method(lambda: None)
        self.launch = self._method(lambda spec, _entry: launched.append(spec))

    @staticmethod
    def _method(answer: Any) -> SimpleNamespace:
        def remote(*arguments: Any) -> SimpleNamespace:
            done: Future[Any] = Future()
            done.set_result(answer(*arguments))
            return SimpleNamespace(future=lambda: done)

        return SimpleNamespace(remote=remote)


async def launched(wanted: DesiredModel, monkeypatch: pytest.MonkeyPatch) -> list[RankSpec]:
    """What the actuator tells each rank of ``wanted``."""
    specs: list[RankSpec] = []
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    nodes: Any = SimpleNamespace(inventory=lambda _: inventory(node("a", 8)))
    actuator = RayActuator(ClusterFacts("c", "/run", SETTINGS), nodes, RayCalls())
    monkeypatch.setattr(actuator, "_make_actors", lambda _order, placed, _group: [Rank(specs) for _ in placed.ranks])
    order = StartOrder(incarnation(), wanted, tuple(range(20000, 20012)), "10.0.0.9:50052", 2)
    placement = place_replica(wanted.layout, inventory(node("a", 8)), {})
    assert isinstance(placement, Placement)
    no_group: Any = None
    await actuator._launch(order, placement, inventory(node("a", 8)), no_group)
    return specs


async def test_every_rank_is_told_what_it_serves_and_which_files_were_planned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = planned(folder)
    specs = await launched(wanted, monkeypatch)
    assert len(specs) == 2
    assert {spec.served_digest for spec in specs} == {digest_of(wanted)}
    assert {spec.checkpoint_digest for spec in specs} == {wanted.checkpoint_digest}
    again = await launched(wanted, monkeypatch)
    assert again == specs
    overwrite(folder / SHARD)
    third = await launched(wanted, monkeypatch)
    assert {spec.served_digest for spec in third} == {digest_of(wanted)} != {spec.served_digest for spec in specs}


async def test_files_that_do_not_answer_fail_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(*_: Any) -> str:
        return await asyncio.Future()

    wanted = planned(folder)
    monkeypatch.setattr(ray_actuator, "FILES_DEADLINE_S", 0.01)
    monkeypatch.setattr(ray_actuator.asyncio, "to_thread", hangs)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    nodes: Any = SimpleNamespace()
    actuator = RayActuator(ClusterFacts("c", "/run", SETTINGS), nodes, RayCalls())
    with pytest.raises(ReplicaError, match=r"tuned did not answer the controller within"):
        await actuator._served_digest(wanted)


async def test_the_endpoint_table_the_welcome_and_the_card_carry_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = planned(folder, max_model_len=64)
    (leader, _), served = await launched(wanted, monkeypatch), digest_of(wanted)
    (endpoint,) = table_of(wanted, leader).endpoints
    assert endpoint.checkpoint_digest == served != wanted.checkpoint_digest
    assert model_card(leader, 340, (), {}, {}).checkpoint_digest == served
    welcome = await answer_to(identity_of(endpoint), leader)
    assert welcome.welcome.identity.checkpoint_digest == served
    check_welcome(welcome, endpoint)
    with pytest.raises(HandshakeRefused, match="digest other"):
        check_welcome(await answer_to(identity(other := replace(leader, served_digest="other")), other), endpoint)
    with pytest.raises(RefusedError, match="not m/0#1"):
        await answer_to(identity_of(endpoint), other)


class RefusedError(Exception):
    pass


class Router:
    """A session's other end: says hello, keeps what it gets."""

    def __init__(self) -> None:
        self.on_room: Any = None
        self.writable = True
        self.got: asyncio.Future[engine_pb2.SessionResponse] = asyncio.get_running_loop().create_future()

    def push(self, message: engine_pb2.SessionResponse) -> None:
        if not self.got.done():
            self.got.set_result(engine_pb2.SessionResponse.FromString(message.SerializeToString()))

    async def abort(self, _code: Any, details: str = "") -> None:
        raise RefusedError(details)


async def answer_to(expected: engine_pb2.ReplicaIdentity, leader: RankSpec) -> engine_pb2.SessionResponse:
    """The first message that ``leader`` sends to a router that expects ``expected``."""
    clock, router = ManualClock(), Router()
    loop: Any = SimpleNamespace(post=lambda _: True, load=LoadSnapshot())
    card = engine_pb2.ModelCard()
    servicer = EngineServicer(identity(leader), card, {}, loop, Sessions(), RankProgress(clock), clock)

    async def hello() -> AsyncIterator[engine_pb2.SessionRequest]:
        yield engine_pb2.SessionRequest(hello=engine_pb2.Hello(expected=expected))
        await asyncio.Future()

    context: Any = router
    session = asyncio.create_task(servicer.Session(hello(), context))
    await asyncio.wait({session, router.got}, return_when=asyncio.FIRST_COMPLETED)
    if session.done():
        await session
    session.cancel()
    await asyncio.wait({session})
    return await router.got


def table_of(wanted: DesiredModel, leader: RankSpec) -> EndpointTable:
    """The endpoint table once the leader has reported READY."""
    progress = RankProgress(ManualClock())
    progress.phase, progress.ports = RankPhase.READY, {"engine": 50060}
    message = Heartbeat(leader, progress, 1, RankMetrics(CollectorRegistry()))._report()
    made, who = fleet(), incarnation()
    made.start(who, wanted.fingerprint, 1, "wanted", 0.0)
    made.advance(who, ReplicaEvent.PLACED, "placed", 0.0)
    made.report(report_from_message(message), object(), 0.0)
    made.advance(who, ReplicaEvent.READY, "ready", 0.0)
    return endpoint_table((wanted,), made.observed(), 1)


def test_the_number_of_replicas_and_the_layout_are_no_part_of_it() -> None:
    assert served_digest(model(replicas=5), "w") == served_digest(model(), "w")
    cut = model(layout=ParallelLayout(1), weight_bytes_per_rank=(1,))
    assert served_digest(cut, "w") == served_digest(model(), "w")
    assert served_digest(model(dtype=Dtype.FLOAT16), "w") != served_digest(model(), "w")
