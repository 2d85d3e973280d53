"""Whatever happens: the fleet converges to what is wanted, and no slot ever has two live generations."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.controller.actions import Advance, Fence, Remove, Start
from cluster.controller.fleet import Fleet
from cluster.controller.reconcile import reconcile
from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.domain.ids import Incarnation, RankId
from cluster.domain.replica import RankPhase, ReplicaPhase
from tests.unit.controller.builders import SETTINGS as DEFAULTS
from tests.unit.controller.builders import model, report

TICK_S = 0.5
SETTINGS = DEFAULTS.model_copy(update={"start_deadline_s": 20.0})
EVENTS = (
    "kill",
    "silence",
    "fail",
    "hang",
    "scale_up",
    "scale_down",
    "change",
    "drain",
    "stuck",
    "crash",
    "wait",
    "node",
)


class World:
    """Processes as they are, beside the fleet that only hears of them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.replicas = 1
        self.max_model_len = 128
        self.alive: dict[Incarnation, int] = {}  # incarnation -> ticks since its start
        self.faults: dict[Incarnation, str] = {}
        self.stuck = False
        self.node_id = "n0"
        self.where: dict[Incarnation, str] = {}
        self.fleet = Fleet(SETTINGS, {}, 0.0)

    @property
    def desired(self):
        return (model(replicas=self.replicas, max_model_len=self.max_model_len),)

    def happen(self, event: str) -> None:
        ready = [v for v in self.fleet.observed().replicas if v.phase is ReplicaPhase.READY]
        victim = next(iter(self.alive), None)
        match event:
            case "scale_up":
                self.replicas = min(3, self.replicas + 1)
            case "scale_down":
                self.replicas = max(0, self.replicas - 1)
            case "change":
                self.max_model_len += 1
            case "drain" if ready:
                self.fleet.advance(ready[0].incarnation, ReplicaEvent.DRAIN, "operator", self.now_s, 3.0)
            case "node":  # one that goes, and comes back as another
                self.fleet.drain_nodes({self.node_id}, "h", self.now_s + 3.0)
                self.node_id = f"n{int(self.node_id[1:]) + 1}"
            case "stuck":
                self.stuck = True
            case "crash":
                slots = self.fleet.slots()
                self.fleet = Fleet(SETTINGS, slots, self.now_s, adopt_for_s=3.0)
            case "kill" | "silence" | "fail" | "hang" if victim:
                self.faults[victim] = event
        self.tick()

    def tick(self) -> None:
        self.now_s += TICK_S
        for who in list(self.alive):
            self.alive[who] += 1
            self.report(who)
        for action in reconcile(self.desired, self.fleet.observed(), SETTINGS, self.now_s):
            self.carry_out(action)

    def report(self, who: Incarnation) -> None:
        fault, age = self.faults.get(who, ""), self.alive[who]
        phases = (RankPhase.STARTING, RankPhase.LOADING, RankPhase.WARMING_UP, RankPhase.READY)
        for rank in range(2):
            if rank == 1 and fault == "kill":
                self.fleet.stream_broken(RankId(who, 1), (who, 1))
                view = self.fleet.view(who)
                if view is not None and view.ranks[1] is None and not view.adopted:  # what the actuator watches for
                    self.fleet.advance(who, ReplicaEvent.FAIL, "dead: its process ended", self.now_s)
            elif rank == 1 and fault == "silence":
                continue
            else:
                phase = RankPhase.FAILED if fault == "fail" else phases[min(age, 3)]
                step_age_s = 100.0 if fault == "hang" else 0.0
                self.fleet.report(
                    report(who, rank, phase, step_age_s=step_age_s, node_id=self.where[who]), (who, rank), self.now_s
                )

    def carry_out(self, action) -> None:
        match action:
            case Start(who, reason):
                assert not [a for a in self.alive if a.replica == who.replica], "two live generations of one slot"
                wanted = self.desired[0]
                self.fleet.start(who, wanted.fingerprint, 2, reason, self.now_s)
                self.alive[who] = 0
                self.where[who] = self.node_id
                self.fleet.note_placed(who, frozenset({self.node_id}))
                self.fleet.advance(who, ReplicaEvent.PLACED, "placed", self.now_s)
            case Advance(who, event, reason, drain_s):
                self.fleet.advance(who, event, reason, self.now_s, drain_s)
            case Remove(who) | Fence(who, _):
                self.fleet.removing(who) if isinstance(action, Remove) else self.fleet.fencing(who, self.now_s)
                gone = not self.stuck
                self.stuck = False
                if gone:
                    self.alive.pop(who, None)
                    self.faults.pop(who, None)
                self.fleet.removed(who, self.now_s, gone=gone)

    def settled(self) -> bool:
        views = self.fleet.observed().replicas
        return (
            len(views) == self.replicas
            and all(v.phase is ReplicaPhase.READY for v in views)
            and all(v.fingerprint == self.desired[0].fingerprint for v in views)
            and not [v for v in views if self.fleet.observed().leaving(v)]
            and set(self.alive) == {v.incarnation for v in views}
            and not self.faults  # nobody has noticed them yet, but will
        )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_it_converges_and_never_has_two_generations(events):
    world = World()
    for event in events:
        world.happen(event)
    generations = {}
    for _ in range(1000):
        world.tick()
        for view in world.fleet.observed().replicas:
            assert view.incarnation.generation >= generations.get(view.replica, 0)
            generations[view.replica] = view.incarnation.generation
        if world.settled():
            break
    assert world.settled(), (world.fleet.observed(), world.alive, world.replicas)
    world.tick()
    assert world.settled()
    assert reconcile(world.desired, world.fleet.observed(), SETTINGS, world.now_s) == ()
