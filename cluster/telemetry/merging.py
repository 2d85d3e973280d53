"""Metrics of several processes shown as those of one. Pure: what is merged was read before.

Counters, histograms and gauges are sums, unless ``RULES`` or the caller says that a gauge is alike in all of them.
When a series began is not told: together they have no such moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from prometheus_client import Metric
from prometheus_client.samples import Sample

Labels = tuple[tuple[str, str], ...]
Combine = Callable[[float, float], float]
_GROWING = frozenset({"counter", "histogram", "summary"})
_SINCE = "_created"
RULES: Mapping[str, Combine] = MappingProxyType(
    {
        "process_start_time_seconds": min,
        "process_max_fds": max,
        "python_info": max,
    }
)


def _add(one: float, other: float) -> float:
    return one + other


class Series:
    """The samples of one process, or of several together: family by name, value by sample name and labels."""

    def __init__(self, families: Iterable[Metric] = ()) -> None:
        self._families: dict[str, Metric] = {}
        self._values: dict[str, dict[tuple[str, Labels], float]] = {}
        for family in families:
            if family.name.endswith(_SINCE):
                continue
            values = self._of(family)
            for sample in family.samples:
                if not sample.name.endswith(_SINCE):
                    values[sample.name, tuple(sorted(sample.labels.items()))] = sample.value

    def _of(self, family: Metric) -> dict[tuple[str, Labels], float]:
        if family.name not in self._families:
            self._families[family.name] = Metric(family.name, family.documentation, family.type)
        return self._values.setdefault(family.name, {})

    def add(self, other: Series, alike: frozenset[str] = frozenset()) -> None:
        """``other`` joins; ``alike`` names the gauges of which the largest counts."""
        for name, family in other._families.items():
            combine = _rule(family, alike)
            mine = self._of(family)
            for key, value in other._values[name].items():
                mine[key] = combine(mine[key], value) if key in mine else value

    def add_where_shown(self, other: Series) -> None:
        """As ``add``, of what only grows, and only series that are here already."""
        for name, family in other._families.items():
            mine = self._values.get(name, {})
            for key, value in other._values[name].items():
                if family.type in _GROWING and key in mine:
                    mine[key] += value

    def growing(self) -> Series:
        """What only grows: what a process that has ended leaves behind."""
        kept = Series()
        kept._families = {name: f for name, f in self._families.items() if f.type in _GROWING}
        kept._values = {name: dict(self._values[name]) for name in kept._families}
        return kept

    def only_shown_by(self, others: Sequence[Series]) -> Series:
        """Without the series that none of ``others`` has: those of models and replicas that are gone."""
        kept = Series()
        kept._families = dict(self._families)
        kept._values = {
            name: {key: value for key, value in values.items() if any(other.shows(name, key) for other in others)}
            for name, values in self._values.items()
        }
        return kept

    def shows(self, family: str, key: tuple[str, Labels]) -> bool:
        """Whether the sample of that name and labels is here."""
        return key in self._values.get(family, ())

    def families(self) -> list[Metric]:
        """In the order in which they came."""
        shown = []
        for name, family in self._families.items():
            metric = Metric(name, family.documentation, family.type)
            metric.samples = [
                Sample(sample, dict(labels), value) for (sample, labels), value in self._values[name].items()
            ]
            shown.append(metric)
        return shown


def _rule(family: Metric, alike: frozenset[str]) -> Combine:
    if family.type not in _GROWING and family.name in alike:
        return max
    return RULES.get(family.name, _add)
