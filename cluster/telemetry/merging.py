"""Metrics of several processes shown as those of one. Pure, and text throughout: what is merged was read before.

Pages are large (seven megabytes with ten thousand replicas) and made by the same code in every process, so that equal
series are equal text. Nobody takes them apart further than name with labels, and value.

Counters, histograms and gauges are sums, unless ``RULES`` or the caller says that a gauge is alike in all of them.
When a series began is not told: together they have no such moment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

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

# The text format, version 0.0.4, as prometheus_client writes it: each family's two headers, then its samples.
_FAMILY = "\n# HELP "
_HEADER = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*) [^\n]*\n# TYPE (?P=name) (?P<kind>[a-z]+)(?:\n|$)")
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="[^"\\\n]*(?:\\[\\n"][^"\\\n]*)*"'
_LABELS = rf"(?:\{{{_LABEL}(?:,{_LABEL})*\}})?"
_ENDINGS = {"histogram": "(?:_bucket|_count|_sum)", "summary": "(?:_count|_sum)?"}


@dataclass(slots=True)
class _Family:
    """``header``: its HELP and TYPE lines. ``values``: by sample name and labels, as they stand in the page."""

    kind: str
    header: str
    values: dict[str, float] = field(default_factory=dict)


class Series:
    """The samples of one process, or of several together."""

    def __init__(self, page: str | None = None) -> None:
        """``page``: what a process shows, at least one family; ValueError when it is anything else."""
        self._families: dict[str, _Family] = {}
        if page is None:
            return
        before, *blocks = f"\n{page}".split(_FAMILY)
        if before or not blocks:
            raise ValueError("it does not begin with a family of metrics")
        for block in blocks:
            self._read(block)

    def _read(self, block: str) -> None:
        header = _HEADER.match(block)
        if header is None:
            raise ValueError(f"this is no family of metrics: {block[:80]!r}")
        name, kind, samples = header["name"], header["kind"], block[header.end() :].removesuffix("\n")
        if name.endswith(_SINCE):
            return
        sample = re.compile(rf"^({name}{_ENDINGS.get(kind, '')}{_LABELS}) (\S+)$", re.MULTILINE)
        found = sample.findall(samples)
        if len(found) != (samples.count("\n") + 1 if samples else 0):
            raise ValueError(f"some lines of {name} are no samples of it")
        family = self._like(name, kind, "# HELP " + header[0].removesuffix("\n"))
        family.values.update({key: float(value) for key, value in found})

    def _like(self, name: str, kind: str, header: str) -> _Family:
        """The family of that name; a new one where there is none."""
        mine = self._families.get(name)
        if mine is None:
            mine = self._families[name] = _Family(kind, header)
        return mine

    def add(self, other: Series, alike: frozenset[str] = frozenset()) -> None:
        """``other`` joins; ``alike`` names the gauges of which the largest counts."""
        for name, family in other._families.items():
            mine = self._like(name, family.kind, family.header).values
            if not mine:
                mine.update(family.values)
                continue
            combine = _rule(name, family.kind, alike)
            for key, value in family.values.items():
                mine[key] = combine(mine[key], value) if key in mine else value

    def add_where_shown(self, other: Series) -> None:
        """As ``add``, of what only grows, and only series that are here already."""
        for name, family in other._families.items():
            if family.kind not in _GROWING or name not in self._families:
                continue
            mine = self._families[name].values
            for key, value in family.values.items():
                if key in mine:
                    mine[key] += value

    def copy(self) -> Series:
        same = Series()
        same.add(self)
        return same

    def growing(self) -> Series:
        """What only grows: what a process that has ended leaves behind."""
        kept = Series()
        for name, family in self._families.items():
            if family.kind in _GROWING:
                kept._families[name] = _Family(family.kind, family.header, dict(family.values))
        return kept

    def only_shown_by(self, others: Sequence[Series]) -> Series:
        """Without the series that none of ``others`` has: those of models and replicas that are gone."""
        kept = Series()
        for name, family in self._families.items():
            shown = [other.keys(name) for other in others]
            values = {key: value for key, value in family.values.items() if any(key in keys for keys in shown)}
            kept._families[name] = _Family(family.kind, family.header, values)
        return kept

    def keys(self, name: str) -> Container[str]:
        """The samples of a family."""
        family = self._families.get(name)
        return family.values.keys() if family is not None else ()

    def page(self) -> str:
        """As any Prometheus reads it, families in the order in which they came."""
        lines = []
        for family in self._families.values():
            lines.append(family.header)
            lines += [f"{key} {_written(value)}" for key, value in family.values.items()]
        return "\n".join(lines) + "\n"


def _written(value: float) -> str:
    """Python's own words, but for what is no number: Prometheus reads them all."""
    return f"{value!r}" if value - value == 0 else {"inf": "+Inf", "-inf": "-Inf"}.get(f"{value!r}", "NaN")


def _add(one: float, other: float) -> float:
    return one + other


def _rule(name: str, kind: str, alike: frozenset[str]) -> Combine:
    if kind not in _GROWING and name in alike:
        return max
    return RULES.get(name, _add)
