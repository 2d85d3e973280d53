"""The key panels as one picture, drawn from the answers that were checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ops.monitoring.prometheus import Series
from ops.monitoring.queries import PanelQuery, pages, panel_queries
from ops.monitoring.verdicts import Watch

# (dashboard, panel), row by row.
SHOWN = (
    ("overview", "Requests by outcome"), ("overview", "Goodput ratio"), ("overview", "Tokens"),
    ("overview", "Time to first token"), ("overview", "Between tokens"), ("overview", "Failovers"),
    ("overview", "Replicas by phase"), ("engine", "Running"), ("ranks", "Steps"),
)  # fmt: skip
COLUMNS = 3
COLOURS = ("#3274d9", "#e0752d", "#37872d", "#a352cc", "#8f8f00", "#0f9d9d", "#7a4b2a", "#d4508f")
RED = "#c4162a"
MEANT = {  # colours that say what they mean
    "completed": "#56a64b", "READY": "#56a64b", "LOADING": "#3274d9", "STARTING": "#f2cc0c", "PENDING": "#b0b0b0",
    "DRAINING": "#a352cc", "FAILED": RED, "STOPPED": "#707070", "failed_replica": RED, "failed_internal": "#8b0000",
    "aborted_client": "#b0b0b0", "aborted_deadline": "#e0752d", "rejected_invalid": "#3274d9",
    "evicted_deadline": "#f2cc0c", "rejected_capacity": "#a352cc", "rejected_unavailable": "#d4508f",
}  # fmt: skip
QUIET = ("objective",)
HEADROOM = 1.15


def draw(watch: Watch, marks: Mapping[float, str], path: Path) -> None:
    """Writes a PNG; time is in seconds from the beginning of the load."""
    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold"})
    rows = -(-len(SHOWN) // COLUMNS)
    figure = Figure(figsize=(15, 3.6 * rows), facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0.03, 1, 0.945), hspace=0.14, h_pad=0.02, w_pad=0.08))
    axes = figure.subplots(rows, COLUMNS)
    for axis, (dashboard, panel) in zip(axes.flat, SHOWN, strict=True):
        _panel(axis, dashboard, panel, watch)
        for at_s in marks:
            axis.axvline(at_s - watch.start_s, color=RED, linestyle=":", linewidth=1.2)
    happened = "".join(f"; dotted line: {what}" for what in marks.values())
    figure.suptitle(f"The demo model, 2 replicas x TP 2 on CPU, under load: what Prometheus answers{happened}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _panel(axis: Axes, dashboard: str, title: str, watch: Watch) -> None:
    queries = [query for query in panel_queries() if (query.dashboard, query.panel) == (dashboard, title)]
    (panel,) = [p for p in pages()[dashboard]["panels"] if p["title"] == title and p["type"] != "row"]
    lines = [(_legend(query, series), series) for query in queries for series in watch.panel(query)]
    defaults = panel["fieldConfig"]["defaults"]
    stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    (_stack if stacked else _lines)(axis, _worth_showing(lines), watch)
    axis.set_title(f"{dashboard.capitalize()}: {title}", loc="left")
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=defaults.get("decimals") == 0))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, queries[0].unit)))
    axis.set_xlim(0, watch.end_s - watch.start_s)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    axis.grid(visible=True, color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    below = axis.legend(
        fontsize=8, loc="upper left", bbox_to_anchor=(-0.02, -0.1), ncols=3, frameon=False, borderaxespad=0,
        columnspacing=1.2, handlelength=1.6,
    )  # fmt: skip
    below.set_in_layout(False)  # long names must not squeeze the axes; there is room below each row


def _worth_showing(lines: list[tuple[str, Series]]) -> list[tuple[str, Series]]:
    """Without those that are 0 throughout, unless all are; the largest first, so that it lies at the bottom."""
    sums = {name: sum(value for _, value in series.points) for name, series in lines}
    shown = [line for line in lines if sums[line[0]]] or lines
    return sorted(shown, key=lambda line: (line[0] in QUIET, not _is_quantile(line[0]), -sums[line[0]], line[0]))


def _is_quantile(name: str) -> bool:
    return re.fullmatch(r"p\d+", name) is not None


def _lines(axis: Axes, lines: list[tuple[str, Series]], watch: Watch) -> None:
    colours, highest = iter(COLOURS * 4), 0.0
    for name, series in lines:
        at, values = _gapped(series, watch)
        if name not in QUIET:
            highest = max(highest, *(value for _, value in series.points))
            axis.plot(at, values, label=name, color=next(colours), linewidth=1.5, marker=".", markersize=2.5)
    axis.set_ylim(0, highest * HEADROOM or 1)
    for name, series in lines:
        if name in QUIET:  # what is far away must not flatten the rest
            value = series.points[-1][1]
            where = "" if value <= highest * HEADROOM else ", above"
            label = f"{name} ({formatted(value, 's')}{where})"
            axis.axhline(value, label=label, color="#666666", linestyle="--", linewidth=1)


def _stack(axis: Axes, lines: list[tuple[str, Series]], watch: Watch) -> None:
    times = sorted({at for _, series in lines for at, _ in series.points})
    columns = [[dict(series.points).get(at, 0.0) for at in times] for _, series in lines]
    others = iter(COLOURS * 4)
    colours = [MEANT.get(name) or next(others) for name, _ in lines]
    seconds = [at - watch.start_s for at in times]
    names = [name for name, _ in lines]
    axis.stackplot(seconds, columns, labels=names, colors=colours, alpha=0.8, step="mid")
    axis.set_ylim(0, max(map(sum, zip(*columns, strict=True)), default=0) * HEADROOM or 1)


def _gapped(series: Series, watch: Watch) -> tuple[list[float], list[float]]:
    """Points, with a hole where Prometheus had none: a line across it would be invented."""
    at: list[float] = []
    values: list[float] = []
    for when_s, value in series.points:
        second = when_s - watch.start_s
        if at and second - at[-1] > 1.5 * watch.step_s:
            at.append(at[-1] + watch.step_s)
            values.append(float("nan"))
        at.append(second)
        values.append(value)
    return at, values


def _legend(query: PanelQuery, series: Series) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: series.labels.get(found.group(1), ""), query.legend)


def formatted(value: float, unit: str) -> str:
    """A value on an axis, in the panel's unit."""
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s":
        return f"{value * 1000:.0f} ms" if value < 1 else f"{value:g} s"
    suffix = {"reqps": " req/s"}.get(unit, unit.removeprefix("suffix:") if unit.startswith("suffix:") else "")
    return f"{value:.4g}{suffix}"
