"""Panels and dashboards in our manner, on the typed builders of grafana-foundation-sdk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "llm-cluster"
GREEN, YELLOW, RED = "green", "yellow", "red"
GRID = 24


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL query and what its series are called in the legend."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel: what it shows and how.

    ``stat``: one large number instead of lines over time. ``width``: of 24 columns. ``colour``: below the
    ``thresholds``, which are (value from which, colour) in rising order.
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 8
    height: int = 8
    stat: bool = False
    stacked: bool = False
    lowest: float | None = 0.0
    highest: float | None = None
    decimals: float | None = None
    colour: str = GREEN
    thresholds: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of a dashboard; several values, or all."""

    name: str
    label: str
    query: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page of graphs."""

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = field(default_factory=tuple)


def to_json(page: Dashboard) -> str:
    """The dashboard as Grafana imports it; the same text for the same input."""
    builder = (
        dashboard.Dashboard(page.title)
        .uid(f"{TAG}-{page.name}")
        .description(page.description)
        .tags([TAG])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .link(
            dashboard.DashboardLink("LLM cluster")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(as_dropdown=True)
            .include_vars(include_vars=True)
            .keep_time(keep_time=True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in page.variables:
        builder.with_variable(_variable(variable))
    number, top = 0, 0
    for row in page.rows:
        number += 1
        builder.with_row(dashboard.Row(row.title).id(number).grid_pos(models.GridPos(h=1, w=GRID, x=0, y=top)))
        top += 1
        left = 0
        for panel in row.panels:
            if left + panel.width > GRID:
                left, top = 0, top + panel.height
            number += 1
            place = models.GridPos(h=panel.height, w=panel.width, x=left, y=top)
            builder.with_panel(_panel(panel, number, place))
            left += panel.width
        top += row.panels[-1].height
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _variable(variable: Variable) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(DATASOURCE)
        .query({"qryType": 1, "query": variable.query, "refId": variable.name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(multi=True)
        .include_all(include_all=True)
        .all_value(".*")  # also where a label is missing: outside Kubernetes nothing has a namespace
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _panel(panel: Panel, number: int, place: models.GridPos) -> stat.Panel | timeseries.Panel:
    builder = _stat(panel) if panel.stat else _lines(panel)
    builder.id(number).title(panel.title).description(panel.description).datasource(DATASOURCE).grid_pos(place)
    builder.unit(panel.unit)
    if panel.lowest is not None:
        builder.min(panel.lowest)
    if panel.highest is not None:
        builder.max(panel.highest)
    if panel.decimals is not None:
        builder.decimals(panel.decimals)
    steps = [models.Threshold(color=panel.colour), *(models.Threshold(value=v, color=c) for v, c in panel.thresholds)]
    builder.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    for index, query in enumerate(panel.queries):
        builder.with_target(_target(query, chr(ord("A") + index)))
    return builder


def _target(query: Query, ref_id: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend)
    return target.ref_id(ref_id).datasource(DATASOURCE).range()


def _stat(panel: Panel) -> stat.Panel:
    return (
        stat.Panel()
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .color_mode(common_models.BigValueColorMode.VALUE if panel.thresholds else common_models.BigValueColorMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def _lines(panel: Panel) -> timeseries.Panel:
    lines = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(30 if panel.stacked else 8)
        .show_points(common_models.VisibilityMode.NEVER)
        .span_nulls(span_nulls=False)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.TABLE)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
            .calcs(["mean", "max", "lastNotNull"])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if panel.stacked:
        lines.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
    if panel.thresholds:
        style = common_models.GraphThresholdsStyleMode.DASHED
        lines.thresholds_style(common.GraphThresholdsStyleConfig().mode(style))
    return lines


def quantiles(series: str, selector: str, by: Sequence[str], legend: str) -> tuple[Query, ...]:
    """The usual three of a histogram; ``legend`` follows the quantile's name."""
    groups = ", ".join(["le", *by])
    rates = f"sum by ({groups}) (rate({series}_bucket{{{selector}}}[$__rate_interval]))"
    return tuple(
        Query(f"histogram_quantile({quantile}, {rates})", f"p{name} {legend}".rstrip())
        for quantile, name in ((0.5, 50), (0.95, 95), (0.99, 99))
    )
