"""Where something waits for nodes, the one who knows why they are missing is asked."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cluster.config.schema import ModelConfig
from cluster.controller.actuator import Explanation, StartOrder, Talk
from cluster.controller.node_outlook import OutlookActuator, OutlookEntry, OutlookPlanner
from cluster.domain.errors import NoFeasiblePlan
from cluster.domain.ids import Incarnation, ReplicaId
from tests.unit.controller.builders import model

WHY = "1 of 2 worker pods wait: w-1 is not scheduled"
INCARNATION = Incarnation(ReplicaId("m", 0), 1)


class Outlook:
    def __init__(self, why: str = "") -> None:
        self.why = why

    def reason(self) -> str:
        return self.why


def make_outlook(argument: str) -> Outlook | None:
    return Outlook(argument) if argument else None


class Actuator:
    """Waits twice, then has room; what else is asked of it is written down."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def start(self, order: StartOrder, talk: Talk) -> None:
        for said in ("1 of 2 devices are free", "1 of 2 devices are free", ""):
            talk.blocked(said)
        talk.placed(frozenset(talk.draining()))

    async def watch(self, incarnation: Incarnation) -> str:
        self.asked.append(incarnation)
        return "story"

    async def destroy(self, incarnation: Incarnation, world_size: int) -> None:
        self.asked.append((incarnation, world_size))

    async def sweep(self, live: frozenset[Incarnation], newest: frozenset[Incarnation] | None = None) -> None:
        self.asked.append((live, newest))

    async def nodes(self) -> Mapping[str, str]:
        return {"a": "10.0.0.1"}


class Planner:
    def __init__(self, *, fits: bool) -> None:
        self._fits = fits

    async def plan(self, config: ModelConfig, kept: object):
        if not self._fits:
            raise NoFeasiblePlan("There is no device to put m on.", (("TP1", "no"),), "add 1 node")
        return model("m")

    async def explain(self, config: ModelConfig, kept: object) -> Explanation:
        return Explanation(feasible=self._fits, text="as it is", json="{}")


async def test_a_start_that_waits_says_which_nodes_are_to_come() -> None:
    outlook, heard = Outlook(WHY), []

    def blocked(reason: str) -> None:
        heard.append(reason)
        outlook.why = ""  # the pod runs by the time it is asked again

    placed: list[frozenset[str]] = []
    order = StartOrder(INCARNATION, model("m"), (20000,), "127.0.0.1:1", 1)
    talk = Talk(blocked, placed.append, lambda: frozenset({"n"}))
    await OutlookActuator(Actuator(), outlook).start(order, talk)
    assert heard == [f"1 of 2 devices are free; {WHY}.", "1 of 2 devices are free", ""]
    assert placed == [{"n"}]


async def test_everything_else_is_the_actuators_own() -> None:
    inner = Actuator()
    actuator = OutlookActuator(inner, Outlook(WHY))
    assert await actuator.watch(INCARNATION) == "story"
    await actuator.destroy(INCARNATION, 2)
    await actuator.sweep(frozenset({INCARNATION}), frozenset())
    assert await actuator.nodes() == {"a": "10.0.0.1"}
    assert inner.asked == [INCARNATION, (INCARNATION, 2), (frozenset({INCARNATION}), frozenset())]


async def test_a_model_that_fits_nowhere_says_it_and_keeps_its_candidates() -> None:
    planner = OutlookPlanner(Planner(fits=False), Outlook(WHY))
    with pytest.raises(NoFeasiblePlan) as raised:
        await planner.plan(ModelConfig(model="m"), ())
    assert str(raised.value) == f"There is no device to put m on; {WHY}."
    assert (raised.value.candidates, raised.value.smallest_change) == ((("TP1", "no"),), "add 1 node")
    assert (await planner.explain(ModelConfig(model="m"), ())).text == f"as it is\n{WHY}"


async def test_a_model_that_fits_hears_nothing_of_it() -> None:
    planner = OutlookPlanner(Planner(fits=True), Outlook(WHY))
    assert (await planner.plan(ModelConfig(model="m"), ())).name == "m"
    assert (await planner.explain(ModelConfig(model="m"), ())).text == "as it is"


async def test_without_a_reason_a_refusal_stays_as_it_is() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"^There is no device to put m on\.$"):
        await OutlookPlanner(Planner(fits=False), Outlook()).plan(ModelConfig(model="m"), ())


def test_an_entry_is_made_where_it_is_needed() -> None:
    entry = OutlookEntry(f"{__name__}:make_outlook", WHY)
    loaded = entry.load()
    assert loaded is not None
    assert loaded.reason() == WHY
    assert OutlookEntry(entry.entry, "").load() is None


def test_the_entry_that_the_command_line_names_exists(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from cluster.assembly import WORKER_PODS_ENTRY

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    assert OutlookEntry(WORKER_PODS_ENTRY, "app=x").load() is None
    assert "outside Kubernetes" in capsys.readouterr().out
