"""Several processes' metrics as those of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    disable_created_metrics,
    enable_created_metrics,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families

from cluster.telemetry.exposition import MetricsServer
from cluster.telemetry.merged_exposition import MergedProcesses
from cluster.telemetry.merging import Series

ALIKE = frozenset({"alike"})
# Of every kind that the text has to keep apart: quotes, escapes, ends of lines and of labels, the headers' own words.
ODD = ("a", "", '"', "\\", "\n", "\\n", "}", '"} 7', ",", "# HELP done_total x", "\n# HELP x", " ", "\r", "\u2028", "ü")


class Process:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counted = Counter("counted", "Things.", ["model"], registry=self.registry)
        self.took = Histogram("took_seconds", "Times.", ["model"], buckets=(1.0, 2.0), registry=self.registry)
        self.now = Gauge("now", "Level.", registry=self.registry)
        self.alike = Gauge("alike", "The same everywhere.", registry=self.registry)
        self.sizes = Summary("sizes", 'With a "word" \\ and\na line.', ["model", "kind"], registry=self.registry)
        self.started = Gauge("process_start_time_seconds", "The first.", registry=self.registry)

    def page(self) -> str:
        return generate_latest(self.registry).decode()

    def series(self) -> Series:
        return Series(self.page())


def values(page: str) -> dict[str, float]:
    """What the reference parser finds in ``page``, labels in a fixed order, but for when a series began."""
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if not family.name.endswith("_created"):
                labels = sorted(sample.labels.items())
                found[f"{sample.name}{labels or ''}"] = sample.value
    return found


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
    one.started.set(8)
    other.started.set(6)
    together = one.series()
    together.add(other.series(), ALIKE)
    assert values(together.page()) == {
        "counted_total[('model', 'a')]": 7,
        "counted_total[('model', 'b')]": 1,
        "took_seconds_bucket[('le', '1.0'), ('model', 'a')]": 1,
        "took_seconds_bucket[('le', '2.0'), ('model', 'a')]": 2,
        "took_seconds_bucket[('le', '+Inf'), ('model', 'a')]": 2,
        "took_seconds_count[('model', 'a')]": 2,
        "took_seconds_sum[('model', 'a')]": 2.0,
        "now": 7,
        "alike": 3,
        "process_start_time_seconds": 6,
    }


NUMBERS = st.one_of(st.integers(0, 5), st.floats(0, 1e300), st.just(float("inf")))
EVENTS = st.lists(
    st.tuples(st.sampled_from(("counted", "took", "now", "alike", "sizes", "started")), st.sampled_from(ODD), NUMBERS),
    max_size=20,
)


def process_of(events: list[tuple[str, str, float]]) -> Process:
    process = Process()
    for metric, label, number in events:
        match metric:
            case "counted":
                process.counted.labels(label).inc(number)
            case "took":
                process.took.labels(label).observe(number)
            case "sizes":
                process.sizes.labels(label, label + label).observe(number)
            case _:
                getattr(process, metric).set(number)
    return process


@pytest.fixture(scope="module", autouse=True)
def told_since_when() -> Iterator[None]:
    """The pages of others may say when a series began."""
    enable_created_metrics()
    yield
    disable_created_metrics()


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=4))
def test_the_text_of_several_is_what_a_parser_would_have_merged(several: list[list[tuple[str, str, float]]]) -> None:
    pages = [process_of(events).page() for events in several]
    together = Series()
    for page in pages:
        together.add(Series(page), ALIKE)
    rules: dict[str, Callable[[float, float], float]] = {"alike": max, "process_start_time_seconds": min}
    expected: dict[str, float] = {}
    for page in pages:
        for key, value in values(page).items():
            expected[key] = (
                rules.get(key, float.__add__)(float(expected[key]), float(value)) if key in expected else value
            )
    assert values(together.page()) == expected
    assert values(Series(together.page()).page()) == expected, "what is shown can be read again"
    headers = [line for line in pages[0].splitlines() if line.startswith("# ") and "_created" not in line]
    assert headers == [line for line in together.page().splitlines() if line.startswith("# ")]


def test_numbers_that_are_none_are_shown() -> None:
    process = Process()
    process.now.set(float("nan"))
    process.alike.set(float("-inf"))
    page = process.series().page()
    assert "\nnow NaN\n" in page
    assert "\nalike -Inf\n" in page


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<html>",
        "done_total 1\n",
        "# HELP done_total Done.\ndone_total 1\n",
        "# HELP done_total Done.\n# TYPE other_total counter\nother_total 1\n",
        "# HELP done_total Done.\n# TYPE done_total counter\ndone_total{ 1\n",
        "# HELP done_total Done.\n# TYPE done_total counter\ndone_total{a=} 1\n",
        '# HELP done_total Done.\n# TYPE done_total counter\ndone_total{a="b"c} 1\n',
        '# HELP done_total Done.\n# TYPE done_total counter\ndone_total{a="b\\x"} 1\n',
        "# HELP done_total Done.\n# TYPE done_total counter\ndone_total many\n",
        "# HELP done_total Done.\n# TYPE done_total counter\ndone_total 1 1700000000\n",
        "# HELP done_total Done.\n# TYPE done_total counter\ndone_total_bucket 1\n",
        "# HELP done_total Done.\n# TYPE done_total counter\ndone_total 1\n\n",
        "# HELP done_total Done.\n# TYPE done_total counter\ndone_total 1\nother 2\n",
    ],
)
def test_what_is_no_page_of_metrics_is_refused_whole(page: str) -> None:
    with pytest.raises(ValueError):
        Series(page)


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
    found = values(together.page())
    assert found["counted_total[('model', 'a')]"] == 4
    assert found["now"] == 1
    assert not any("gone" in name for name in [*found, *values(retired.page())])


def test_what_joins_is_left_as_it_was() -> None:
    one, together = Process().series(), Series()
    before = one.page()
    together.add(one)
    together.add(one)
    assert one.page() == before


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
            found = values(merged.page().body.decode())
            assert found["starts_total"] == 1
            return found["counted_total[('model', 'a')]"]

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
