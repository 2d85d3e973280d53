from __future__ import annotations

from prometheus_client import CollectorRegistry

from cluster.config.schema import RouterConfig
from cluster.domain.request import Outcome
from cluster.router.endpoint_table import Standing
from cluster.router.fleet_health import EJECTION_CAUSES
from cluster.router.fleet_series import GONE_MODELS_MAX, FleetSeries
from cluster.router.retry_budget import RetryRefused
from cluster.router.sequence_stream import LossReason
from cluster.telemetry.metrics import LATENCY_BUCKETS_S, RouterMetrics

HISTOGRAMS = 4
# Goodput, prompt and generation tokens, running, queued requests and tokens, endpoints; three of prefix indexes.
PLAIN_OF_MODEL = 12
PER_MODEL = len(Outcome) + PLAIN_OF_MODEL + HISTOGRAMS * (len(LATENCY_BUCKETS_S) + 1 + 2)
PER_ROUTER = (
    len(LossReason) + len(EJECTION_CAUSES) + len(RetryRefused) + 2 + 2
)  # the objectives; processes and restarts
PER_REPLICA = len(Standing) + 1  # and one scorer's picks


class Page:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(self.registry)
        self.series = FleetSeries(self.metrics, RouterConfig(ttft_objective_s=1.5, tpot_objective_s=0.1))

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        found = (s for family in self.registry.collect() for s in family.samples)
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in found}

    def of(self, label: str, value: str) -> list[str]:
        return [name for name, labels in self.samples() if (label, value) in labels]


def test_every_counter_of_a_model_begins_at_zero_with_it() -> None:
    page = Page()
    page.series.follow({"demo": 2}, frozenset({"demo/0", "demo/1"}))
    found = page.samples()
    assert found["cluster_router_endpoints", (("model", "demo"),)] == 2
    for outcome in Outcome:
        assert found["cluster_router_requests_total", (("model", "demo"), ("outcome", outcome.value))] == 0
    for name in ("goodput_requests_total", "prompt_tokens_total", "generation_tokens_total", "requests_running"):
        assert found[f"cluster_router_{name}", (("model", "demo"),)] == 0
    assert found["cluster_router_failovers_total", (("reason", "broken"),)] == 0
    assert found["cluster_router_ttft_objective_seconds", ()] == 1.5
    assert found["cluster_router_tpot_objective_seconds", ()] == 0.1


def test_counters_outlive_a_replica_and_end_with_the_model() -> None:
    page = Page()
    page.series.follow({"a": 1, "b": 1}, frozenset({"a/0", "b/0"}))
    page.metrics.generation_tokens.labels(model="a").inc(7)
    page.metrics.endpoint_picks.labels(replica="a/0", scorer="only").inc(1)
    page.series.follow({"a": 0, "b": 1}, frozenset({"b/0"}))
    assert page.samples()["cluster_router_generation_tokens_total", (("model", "a"),)] == 7
    assert page.of("replica", "a/0") == []
    page.series.follow({"b": 1}, frozenset({"b/0"}))
    assert page.of("model", "a") == []
    assert page.of("model", "b") != []


def test_a_late_request_of_a_gone_model_leaves_nothing_behind() -> None:
    page = Page()
    page.series.follow({"a": 1, "b": 1}, frozenset({"a/0", "b/0"}))
    page.series.follow({"b": 1}, frozenset({"b/0"}))
    page.metrics.requests.labels(model="a", outcome="completed").inc(1)
    page.series.follow({"b": 0}, frozenset())
    assert page.of("model", "a") == []


def test_what_is_kept_at_hand_counts_on_the_page_when_a_model_comes_back() -> None:
    page = Page()
    for _ in range(2):
        page.series.follow({"a": 1}, frozenset({"a/0"}))
        page.metrics.of_request.requests["a", "completed"].inc(1)
        page.metrics.of_request.prompt_tokens["a",].inc(3)
        page.metrics.of_request.endpoint_picks["a/0", "only"].inc(1)
        found = page.samples()
        assert found["cluster_router_requests_total", (("model", "a"), ("outcome", "completed"))] == 1
        assert found["cluster_router_prompt_tokens_total", (("model", "a"),)] == 3
        assert found["cluster_router_endpoint_picks_total", (("replica", "a/0"), ("scorer", "only"))] == 1
        page.series.follow({}, frozenset())
        assert (page.of("model", "a"), page.of("replica", "a/0")) == ([], [])


def test_series_are_bounded_by_models_and_replicas_whatever_comes_and_goes() -> None:
    page = Page()
    models, replicas = 5, 8
    for generation in range(20):
        names = [f"m{generation}-{index}" for index in range(models)]
        slots = {f"{name}/{slot}" for name in names for slot in range(replicas)}
        page.series.follow(dict.fromkeys(names, replicas), frozenset(slots))
        for replica in slots:
            page.metrics.endpoint_picks.labels(replica=replica, scorer="least_load").inc(1)
        for name in names:
            page.metrics.time_to_first_token.labels(model=name).observe(0.1)
    assert len(page.samples()) == PER_ROUTER + models * (PER_MODEL + PER_REPLICA * replicas)


def test_only_what_leaves_is_looked_for_and_what_requests_have_at_hand_stays() -> None:
    page = Page()
    page.series.follow({"a": 1, "b": 1}, frozenset({"a/0", "b/0", "b/1"}))
    page.series.follow({"b": 1}, frozenset({"b/0", "b/1"}))
    at_hand = page.metrics.of_request
    for ready in (0, 1, 2):
        page.series.follow({"b": ready}, frozenset({"b/0", "b/1"}))
    assert page.metrics.of_request is at_hand, "nothing has left"
    page.series.follow({"b": 0}, frozenset())
    assert page.metrics.of_request is not at_hand
    assert (page.of("replica", "b/0"), page.of("replica", "b/1")) == ([], [])


def test_models_that_come_and_go_leave_no_names_behind() -> None:
    page = Page()
    for index in range(5 * GONE_MODELS_MAX):
        page.series.follow({f"m{index}": 1}, frozenset())
    page.series.follow({}, frozenset())
    assert len(page.series._gone) == GONE_MODELS_MAX
    assert page.metrics.shown("model") == frozenset()
    page.series.follow({f"m{5 * GONE_MODELS_MAX - 1}": 1}, frozenset())
    assert len(page.series._gone) == GONE_MODELS_MAX - 1, "one that is back is not gone"
    assert page.metrics.shown("model") == {f"m{5 * GONE_MODELS_MAX - 1}"}


def test_all_models_that_leave_at_once_are_forgotten() -> None:
    page = Page()
    page.series.follow({f"m{index}": 1 for index in range(2 * GONE_MODELS_MAX)}, frozenset())
    page.series.follow({}, frozenset())
    assert page.metrics.shown("model") == frozenset()
