"""What sessions tell, as the choice of an endpoint, the retries and the metrics see it."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from cluster.domain.clock import ManualClock
from cluster.domain.endpoint import LoadSnapshot
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.endpoint_table import Standing
from cluster.router.fleet_health import EJECTION_CAUSES, FleetHealth, SessionPulse
from cluster.router.sequence_stream import LossReason
from cluster.telemetry.metrics import RouterMetrics

BUSY = LoadSnapshot(running_sequences=1)


def at(slot: int, generation: int = 1) -> Incarnation:
    return Incarnation(ReplicaId("demo", slot), generation)


class Site:
    def __init__(self, replicas: int = 2) -> None:
        self.clock, self.registry = ManualClock(), CollectorRegistry()
        self.health = FleetHealth(self.clock, RouterMetrics(self.registry))
        self.pulses = [self.open(at(slot)) for slot in range(replicas)]

    def open(self, incarnation: Incarnation) -> SessionPulse:
        pulse = self.health.pulse(incarnation)
        pulse.came_up()
        return pulse

    def standings(self) -> list[Standing]:
        return [self.health.standing(at(slot)) for slot in range(len(self.pulses))]

    def shown(self, slot: int) -> list[str]:
        labels = [{"replica": f"demo/{slot}", "standing": s.value} for s in Standing]
        value = self.registry.get_sample_value
        return [x["standing"] for x in labels if value("cluster_router_endpoint_standing", x)]

    def ejections(self) -> dict[str, float]:
        value = self.registry.get_sample_value
        found = {cause: value("cluster_router_ejections_total", {"reason": cause}) for cause in EJECTION_CAUSES}
        return {cause: count for cause, count in found.items() if count}


@pytest.mark.parametrize("reason", list(LossReason))
def test_only_what_the_transport_or_a_hung_step_did_ejects(reason: LossReason) -> None:
    site = Site()
    site.pulses[0].went_down(reason, 3)
    site.pulses[0].came_up()
    transport = reason in (LossReason.BROKEN, LossReason.SILENT, LossReason.STUCK)
    assert site.standings() == [Standing.EJECTED if transport else Standing.HEALTHY, Standing.HEALTHY]
    assert site.shown(0) == ["ejected" if transport else "healthy"]
    assert site.ejections() == ({reason.value: 1} if transport else {})


def test_the_probe_that_gets_a_token_ends_it() -> None:
    site = Site()
    site.pulses[0].went_down(LossReason.BROKEN, 0)
    site.pulses[0].came_up()
    site.clock.advance(1.0)
    assert site.standings()[0] is Standing.HEALTHY, "one may go"
    site.health.picked(at(0))
    assert site.standings()[0] is Standing.EJECTED
    site.pulses[0].stepped(7, BUSY)
    assert site.standings()[0] is Standing.HEALTHY
    assert site.shown(0) == ["healthy"]


def test_a_probe_that_was_not_sent_leaves_the_next_one_free() -> None:
    site = Site()
    site.pulses[0].went_down(LossReason.BROKEN, 0)
    site.pulses[0].came_up()
    site.clock.advance(1.0)
    not_sent = site.health.picked(at(0))
    assert not_sent is not None
    assert site.standings()[0] is Standing.EJECTED
    not_sent()
    assert site.standings()[0] is Standing.HEALTHY
    assert site.health.picked(at(0)) is not None, "this one is the probe now"
    assert site.health.picked(at(1)) is None, "there is nothing to take back"


def test_a_slow_one_is_shown_and_counted_once() -> None:
    site = Site()
    for step in range(1, 201):
        site.clock.advance(0.03)
        site.pulses[1].stepped(step, BUSY)
        if step % 10 == 0:
            site.pulses[0].stepped(step // 10, BUSY)
            site.pulses[0].beat(0.1)
    assert site.standings() == [Standing.SLOW, Standing.HEALTHY]
    assert (site.shown(0), site.ejections()) == (["slow"], {"slow": 1})


@pytest.mark.parametrize("counts", [(64, 1), (64, 64)])
def test_a_step_has_as_many_sequences_as_the_load_says(counts: tuple[int, int]) -> None:
    """Four times as long: with 64 times as many sequences that is no wonder."""
    site = Site()
    loads = [LoadSnapshot(running_sequences=count) for count in counts]
    for step in range(1, 201):
        site.clock.advance(0.03)
        site.pulses[1].stepped(step, loads[1])
        if step % 4 == 0:
            site.pulses[0].stepped(step // 4, loads[0])
    assert site.pulses[0].slow is (counts[0] == counts[1])


def test_requests_and_losses_reach_the_budget() -> None:
    site = Site()
    assert site.health.retry(at(0)) is None
    while site.health.retry(at(0)) is None:
        continue
    assert 0 < (site.health.retry(at(0)) or 0) <= 1.0
    for _ in range(5):
        site.pulses[1].submitted(1)
        site.pulses[1].submitted(2)
    assert [site.health.retry(at(0)) is None for _ in range(2)] == [True, False]
    site.pulses[0].went_down(LossReason.SILENT, 2)
    assert [site.health.retry(at(0)) is None for _ in range(3)] == [True, True, False]
    site.pulses[1].closed(1)
    assert [site.health.retry(at(1)) is None for _ in range(2)] == [True, False]


def test_a_new_incarnation_shows_healthy_whatever_the_last_one_was() -> None:
    site = Site()
    site.pulses[0].went_down(LossReason.BROKEN, 0)
    site.pulses[0].closed(0)
    site.open(at(0, 2))
    assert site.shown(0) == ["healthy"]
    assert site.health.standing(at(0, 2)) is Standing.HEALTHY


@pytest.mark.parametrize(
    ("before", "after", "slow"),
    [
        (BUSY, BUSY, True),
        (LoadSnapshot(running_sequences=1, queued_prompt_tokens=4000), BUSY, False),
        (LoadSnapshot(), BUSY, False),
    ],
    ids=["decodes", "a chunk of a prompt", "a newcomer"],
)
def test_steps_that_compute_prompts_are_no_quick_verdict(before: LoadSnapshot, after: LoadSnapshot, slow: bool) -> None:
    """Four that take ten times as long as before, and as those of the other replica."""
    site = Site()
    for step in range(1, 101):
        site.clock.advance(0.03)
        for pulse in site.pulses:
            pulse.stepped(step, BUSY)
    for step in range(1, 41):
        site.clock.advance(0.03)
        site.pulses[1].stepped(100 + step, BUSY)
        if step % 10 == 0:
            site.pulses[0]._load = before
            site.pulses[0].stepped(100 + step // 10, after)
    assert site.pulses[0].slow is slow
