"""Several processes' metrics as those of one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.telemetry.exposition import MetricsServer
from cluster.telemetry.merged_exposition import MergedProcesses
from cluster.telemetry.merging import Series

ALIKE = frozenset({"alike"})


class Process:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counted = Counter("counted", "Things.", ["model"], registry=self.registry)
        self.took = Histogram("took_seconds", "Times.", ["model"], buckets=(1.0, 2.0), registry=self.registry)
        self.now = Gauge("now", "Level.", registry=self.registry)
        self.alike = Gauge("alike", "The same everywhere.", registry=self.registry)

    def series(self) -> Series:
        return Series(text_string_to_metric_families(generate_latest(self.registry).decode()))


def values(series: Series) -> dict[str, float]:
    return {
        f"{s.name}{sorted(s.labels.items()) if s.labels else ''}": s.value for f in series.families() for s in f.samples
    }


def test_counters_and_histograms_are_sums_and_gauges_as_they_mean() -> None:
    one, other = Process(), Process()
    one.counted.labels("a").inc(3)
    other.counted.labels("a").inc(4)
    other.counted.labels("b").inc()
    one.took.labels("a").observe(0.5)
    other.took.labels("a").observe(1.5)
    one.now.set(2)
    other.now.set(5)
    one.alike.set(2)
    other.alike.set(3)
    together = one.series()
    together.add(other.series(), ALIKE)
    assert values(together) == {
        "counted_total[('model', 'a')]": 7,
        "counted_total[('model', 'b')]": 1,
        "took_seconds_bucket[('le', '1.0'), ('model', 'a')]": 1,
        "took_seconds_bucket[('le', '2.0'), ('model', 'a')]": 2,
        "took_seconds_bucket[('le', '+Inf'), ('model', 'a')]": 2,
        "took_seconds_count[('model', 'a')]": 2,
        "took_seconds_sum[('model', 'a')]": 2.0,
        "now": 7,
        "alike": 3,
    }


def test_of_the_dead_only_what_grows_stays_and_only_where_somebody_lives() -> None:
    dead, living = Process(), Process()
    dead.counted.labels("a").inc(3)
    dead.counted.labels("gone").inc(8)
    dead.now.set(9)
    living.counted.labels("a").inc(1)
    living.now.set(1)
    retired = dead.series().growing().only_shown_by([living.series()])
    together = living.series()
    together.add_where_shown(retired)
    found = values(together)
    assert found["counted_total[('model', 'a')]"] == 4
    assert found["now"] == 1
    assert not any("gone" in name for name in [*found, *values(retired)])


def test_what_is_shown_can_be_read_again() -> None:
    """Over HTTP, with a process that ends and one that does not answer."""
    one, other, own = Process(), Process(), CollectorRegistry()
    Counter("starts", "Of ours.", registry=own).inc()
    servers = [MetricsServer(p.registry, "127.0.0.1", 0, ready=lambda: True) for p in (one, other)]
    merged = MergedProcesses(own, ALIKE)
    try:
        assert not merged.ready()
        merged.join("one", servers[0].port)
        merged.join("other", servers[1].port)
        assert merged.ready()
        one.counted.labels("a").inc(3)
        other.counted.labels("a").inc(4)

        def total() -> float | None:
            text = generate_latest(merged.registry).decode()
            assert list(text_string_to_metric_families(text))
            assert "starts_total 1.0" in text
            return merged.registry.get_sample_value("counted_total", {"model": "a"})

        assert total() == 7
        servers[0].close()
        assert total() == 7, "one that does not answer counts with its last answer"
        merged.leave("one")
        assert total() == 7, "one that has ended still counts"
        other.counted.labels("a").inc()
        assert total() == 8
    finally:
        merged.close()
        servers[1].close()
