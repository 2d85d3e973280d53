"""docs/metrics.md: every metric, from the declarations, and every alert, from the rule files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TypeVar

from cluster.controller.replica_lifecycle import ReplicaEvent
from cluster.controller.replica_series import NO_ROOM
from cluster.domain.replica import RankPhase, ReplicaPhase
from cluster.domain.request import Outcome
from cluster.router.endpoint_table import Standing
from cluster.router.fleet_health import EJECTION_CAUSES, SLOW
from cluster.router.retry_budget import RetryRefused
from cluster.router.sequence_stream import LossReason
from cluster.router.server import UNKNOWN_MODEL
from ops.monitoring.declared import GROUPS, Metric, declared, of_every_process
from ops.monitoring.rules import Rule, rules

PATH = "docs/metrics.md"
Value = TypeVar("Value", bound=str)
HEAD = """\
# Metrics and alerts

Written by `ops/generate`. Every process serves its own on `/metrics` (port 9100 or the next free one); the controller's
`/targets` lists them for Prometheus's `http_sd_configs` (workers that were given `--controller`). `docs/operating.md`
shows how to watch a cluster.

Labels come from closed sets: there is never the id of a request. Series end with the model or replica they are about;
what a router counts of a model outlives the model's replicas. Counters of a model begin at 0 with the model.
"""
OUTCOMES = {
    Outcome.COMPLETED: "ended by stop or length",
    Outcome.ABORTED_CLIENT: "its client left, cancelled, or read nothing for `client_stall_s`",
    Outcome.ABORTED_DEADLINE: "its deadline came after the first token",
    Outcome.REJECTED_INVALID: "a bad field, too long, or no such model",
    Outcome.REJECTED_CAPACITY: "a queue or a limit was full, or the wait was too long (`max_queue_wait_s`)",
    Outcome.EVICTED_DEADLINE: "its deadline came before the first token, or its turn would have come too late for it",
    Outcome.REJECTED_UNAVAILABLE: "no replica was ready, or the router drained",
    Outcome.FAILED_REPLICA: "it lost its replica, and no other came in `failover_wait_s` or it was not sent to another "
    "(`cluster_router_retries_refused_total`)",
    Outcome.FAILED_INTERNAL: "a bug",
}
LOSSES = {
    LossReason.BROKEN: "the session's stream ended or failed",
    LossReason.SILENT: "no message for `engine_silence_s`",
    LossReason.STUCK: "one step ran for `engine_step_deadline_s`",
    LossReason.REMOVED: "the controller took the replica out of the table",
    LossReason.DROPPED: "the engine ended the sequence without being asked",
    LossReason.OVERFLOW: "more updates than a request can have",
    LossReason.SLOW: "the replica was much slower than its peers, and one of them had room",
}
STANDINGS = {
    Standing.HEALTHY.value: "gets new requests, also while a probe of it is due",
    Standing.SLOW.value: "its steps take several times as long as those of its peers; it gets probes",
    Standing.EJECTED.value: "its session failed; it gets a probe after a while",
}
EJECTIONS = {
    **{cause: LOSSES[LossReason(cause)] for cause in EJECTION_CAUSES if cause != SLOW},
    SLOW: "its steps took several times as long as those of its peers",
}
REFUSED_RETRIES = {
    RetryRefused.FAILOVERS: "it had outlived as many replicas",
    RetryRefused.FRUITLESS: "several replicas in a row broke under it before they gave it a token",
    RetryRefused.BUDGET: "retries had had their share of the traffic",
}


def files() -> dict[str, str]:
    return {PATH: page()}


def page() -> str:
    parts = [HEAD]
    for group, (_, where) in GROUPS.items():
        parts += [f"## {group.capitalize()}\n", f"{where}\n", _table(m for m in declared() if m.group == group)]
    parts += ["## Every process\n", "From prometheus_client, about the process itself.\n", _table(of_every_process())]
    parts += ["## Labels\n", _labels(), "## Recording rules\n", _recorded(), "## Alerts\n", ALERTS_HEAD]
    parts += [_alert(rule) for rule in rules() if rule.is_alert]
    return "\n".join(parts)


ALERTS_HEAD = """\
Each compares a recording rule with a number (`helm/llm-cluster/rules/`). `ops/monitor` proves on a live cluster that
every one of them has data.
"""


def _table(metrics: Iterable[Metric]) -> str:
    rows = [
        (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), _meaning(metric))
        for metric in metrics
    ]
    return _markdown(("name", "type", "labels", "meaning"), rows)


def _meaning(metric: Metric) -> str:
    if not metric.buckets:
        return metric.meaning
    return f"{metric.meaning} Buckets: {' '.join(f'{bound:g}' for bound in metric.buckets)}."


def _labels() -> str:
    rows = [
        ("`model`", f"what clients call it; `{UNKNOWN_MODEL}` for requests that name no served model"),
        ("`replica`", "MODEL/SLOT; a rebuilt replica keeps its name"),
        ("`rank`", "0 is the leader"),
        ("`node`", "the address by which the others reach the rank's machine"),
        ("`device`", "cpu or cuda"),
        ("`outcome`", _explained(OUTCOMES)),
        ("`reason` of failovers", _explained(LOSSES)),
        ("`reason` of ejections", _explained(EJECTIONS)),
        ("`reason` of retries refused", _explained(REFUSED_RETRIES)),
        ("`standing`", _explained(STANDINGS)),
        ("`reason` of a blocked placement", f"`{NO_ROOM}`"),
        ("`reason` of transitions", f"{_values(ReplicaEvent)}, or what failed (start, dead, failed, silent ...)"),
        ("`phase`, `from`, `to` of replicas", _values(ReplicaPhase)),
        ("`state` of a rank, `phase` of a node's ranks", _values(RankPhase)),
        ("`kind` of a step", "`prefill`, `decode`, `mixed`"),
        ("`scorer`", "the policy's part that decided; `only` when there was no choice"),
        ("`call`", "the controller's call to Ray"),
    ]
    return _markdown(("label", "values"), rows)


def _explained(values: Mapping[Value, str]) -> str:
    return "; ".join(f"`{value}`: {meaning}" for value, meaning in values.items())


def _values(kind: type[StrEnum]) -> str:
    return ", ".join(f"`{value.value}`" for value in kind)


def _recorded() -> str:
    rows = [(f"`{rule.name}`", f"`{_one_line(rule.expr)}`") for rule in rules() if not rule.is_alert]
    return _markdown(("name", "is"), rows)


def _alert(rule: Rule) -> str:
    pending = "at once" if rule.pending in ("", "0m") else f"after {rule.pending}"
    return (
        f"### {rule.name}\n\n{rule.labels['severity'].capitalize()}, {pending}: `{_one_line(rule.expr)}`\n\n"
        f"{_plain(rule.annotations['description'])}\n"
    )


def _plain(template: str) -> str:
    """An annotation for a reader who has no alert before them: its labels by their names."""
    for label in ("model", "replica", "rank", "instance"):
        template = template.replace(f"{{{{ $labels.{label} }}}}", f"a {label}" if label != "instance" else "a router")
    return template.replace("|", "\\|")


def _one_line(expr: str) -> str:
    return " ".join(expr.split()).replace("( ", "(").replace(" )", ")")


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
