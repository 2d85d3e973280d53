"""What is wrong with a PromQL query, given what is exported: names, labels, counters that are not rated, joins.

Pure, on the syntax tree of promql-parser (which also refuses what does not parse or has the wrong type).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import promql_parser as promql

from ops.monitoring.declared import PROMETHEUS_SERIES, TARGET_LABELS, Metric

RATING = frozenset({"rate", "increase", "irate"})
OF_GAUGES = frozenset({"deriv", "delta", "predict_linear"})
NO_LABELS = frozenset({"vector", "scalar", "time", "absent"})
KEEPS_LABELS = frozenset({"topk", "bottomk"})


@dataclass(frozen=True, slots=True)
class Series:
    """One name that queries may use: its labels, and whether it only grows."""

    labels: frozenset[str]
    grows: bool = False
    bucket: bool = False


class QueryError(ValueError):
    """One thing that is wrong with a query."""


@dataclass(slots=True)
class Catalogue:
    """Every name that queries may use; recording rules are added in their order."""

    series: dict[str, Series] = field(default_factory=dict)

    @classmethod
    def of(cls, metrics: Iterable[Metric]) -> Catalogue:
        made = cls({name: Series(TARGET_LABELS) for name in PROMETHEUS_SERIES})
        for metric in metrics:
            labels = TARGET_LABELS | set(metric.labels)
            grows = metric.kind in ("counter", "histogram")
            for name in metric.series_names:
                bucket = bool(metric.buckets) and name.endswith("_bucket")
                made.series[name] = Series(labels | {"le"} if bucket else labels, grows, bucket)
        return made

    def record(self, name: str, expr: str) -> None:
        """A recording rule; QueryError when its query is wrong or its name is taken."""
        if name in self.series:
            raise QueryError(f"{name} is there twice")
        self.series[name] = Series(self.check(expr))

    def check(self, expr: str) -> frozenset[str]:
        """The labels of the answer; QueryError when the query is wrong."""
        try:
            tree = promql.parse(expr)
        except ValueError as error:
            raise QueryError(f"{error} in {expr}") from None
        try:
            return self._labels(tree)
        except QueryError as problem:
            raise QueryError(f"{problem} in {expr}") from None

    def names(self, expr: str) -> frozenset[str]:
        """The series that a query names."""
        return frozenset(selector.name for selector in selectors(promql.parse(expr)))

    def _labels(self, node: Any, *, counted: bool = False) -> frozenset[str]:
        match node:
            case promql.NumberLiteral() | promql.StringLiteral():
                return frozenset()
            case promql.ParenExpr() | promql.UnaryExpr():
                return self._labels(node.expr, counted=counted)
            case promql.VectorSelector():
                if self._series(node).grows and not counted:
                    raise QueryError(f"{node.name} only grows and is not rated")
                return self._series(node).labels
            case promql.Call():
                return self._of_call(node)
            case promql.AggregateExpr():
                return self._of_aggregation(node)
            case promql.BinaryExpr():
                return self._of_operation(node)
        raise QueryError(f"{type(node).__name__} stands where no function takes it")

    def _series(self, selector: Any) -> Series:
        found = self.series.get(selector.name)
        if found is None:
            raise QueryError(f"nobody exports {selector.name}")
        unknown = {matcher.name for matcher in selector.matchers.matchers} - found.labels
        if unknown:
            raise QueryError(f"{selector.name} has no label {', '.join(sorted(unknown))}")
        return found

    def _of_call(self, call: Any) -> frozenset[str]:
        name = call.func.name
        if name in NO_LABELS:
            for argument in call.args:
                self._labels(argument, counted=True)
            return frozenset()
        labels: frozenset[str] = frozenset()
        for argument in call.args:
            if isinstance(argument, promql.MatrixSelector):
                labels |= self._of_range(name, argument.vector_selector)
            else:
                labels |= self._labels(argument)
        if name == "histogram_quantile":
            if "le" not in labels or not self._only_buckets(call.args[1]):
                raise QueryError("histogram_quantile needs the le of _bucket series")
            labels -= {"le"}
        return labels

    def _of_range(self, function: str, selector: Any) -> frozenset[str]:
        series = self._series(selector)
        if series.grows and function not in RATING:
            raise QueryError(f"{selector.name} only grows and is not rated")
        if not series.grows and function in RATING:
            raise QueryError(f"{selector.name} is no counter; use {', '.join(sorted(OF_GAUGES))}")
        return series.labels

    def _only_buckets(self, node: Any) -> bool:
        return any(self.series[s.name].bucket for s in selectors(node))

    def _of_aggregation(self, node: Any) -> frozenset[str]:
        inner = self._labels(node.expr, counted=str(node.op) == "count")
        keeps = str(node.op) in KEEPS_LABELS
        if node.modifier is None:
            return inner if keeps else frozenset()
        labels = frozenset(node.modifier.labels)
        if labels - inner:
            raise QueryError(f"there is no label {', '.join(sorted(labels - inner))} to aggregate by")
        if keeps:
            return inner
        return labels if node.modifier.type == promql.AggModifierType.By else inner - labels

    def _of_operation(self, node: Any) -> frozenset[str]:
        left, right = self._labels(node.lhs), self._labels(node.rhs)
        if is_scalar(node.lhs) or is_scalar(node.rhs):
            return left | right
        if str(node.op) == "or":
            return left | right
        modifier = node.modifier
        matching = modifier.matching if modifier is not None else None
        if matching is None:
            if left != right:
                apart = ", ".join(sorted(left ^ right))
                raise QueryError(f"the sides of {node.op} never match: only one of them has {apart}")
            return left
        on = frozenset(matching.labels)
        if on - left or on - right:
            raise QueryError(f"not both sides of {node.op} have {', '.join(sorted((on - left) | (on - right)))}")
        brought = frozenset(modifier.group_labels or ())
        if brought - right:
            raise QueryError(f"the right side of {node.op} brings no {', '.join(sorted(brought - right))}")
        many = modifier.card == promql.VectorMatchCardinality.ManyToOne or str(node.op) in ("and", "unless")
        return left | brought if many else on


def is_scalar(node: Any) -> bool:
    if isinstance(node, promql.ParenExpr | promql.UnaryExpr):
        return is_scalar(node.expr)
    if isinstance(node, promql.BinaryExpr):
        return is_scalar(node.lhs) and is_scalar(node.rhs)
    return isinstance(node, promql.NumberLiteral) or (
        isinstance(node, promql.Call) and node.func.name in ("scalar", "time")
    )


def selectors(node: Any) -> Iterable[Any]:
    """Every selector below ``node``."""
    match node:
        case promql.VectorSelector():
            yield node
        case promql.MatrixSelector():
            yield node.vector_selector
        case promql.Call():
            for argument in node.args:
                yield from selectors(argument)
        case promql.BinaryExpr():
            yield from selectors(node.lhs)
            yield from selectors(node.rhs)
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from selectors(node.expr)


def operand(expr: str) -> tuple[str, str, float]:
    """An alert's left side, comparison and threshold; QueryError when it is anything but OPERAND op NUMBER."""
    tree = promql.parse(expr)
    if not isinstance(tree, promql.BinaryExpr) or str(tree.op) not in ("<", "<=", ">", ">=", "==", "!="):
        raise QueryError(f"{expr} compares nothing with a number")
    if not isinstance(tree.rhs, promql.NumberLiteral):
        raise QueryError(f"{expr} compares with something else than a number")
    return tree.lhs.prettify(), str(tree.op), tree.rhs.val
