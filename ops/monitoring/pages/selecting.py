"""What the dashboards' variables select, and how series without labels find their replica."""

from __future__ import annotations

from ops.monitoring.panels import Variable

HERE = 'namespace=~"$namespace"'
MODEL = f'{HERE}, model=~"$model"'
REPLICA = f'{HERE}, replica=~"$replica"'
MODEL_AND_REPLICA = f'{MODEL}, replica=~"$replica"'

NAMESPACE_VARIABLE = Variable("namespace", "Namespace", "label_values(cluster_desired_replicas, namespace)")
MODEL_VARIABLE = Variable("model", "Model", f"label_values(cluster_desired_replicas{{{HERE}}}, model)")
REPLICA_VARIABLE = Variable("replica", "Replica", f"label_values(cluster_engine_info{{{MODEL}}}, replica)")
RANKS_REPLICA_VARIABLE = Variable("replica", "Replica", f"label_values(cluster_rank_info{{{MODEL}}}, replica)")

# One series on either side for each address: a new process may have the port of another that was killed, whose series
# Prometheus keeps for some scrapes, under labels of their own. A join with both fails, and with it every graph that has
# this moment in it.
_OF_ENGINE = (
    f"* on (job, instance) group_left (model, replica) "
    f"topk by (job, instance) (1, cluster_engine_info{{{MODEL_AND_REPLICA}}})"
)
_OF_RANK = (
    f"* on (job, instance) group_left (replica, rank) "
    f"topk by (job, instance) (1, cluster_rank_info{{{MODEL_AND_REPLICA}}})"
)
_OF_INFO = frozenset({"model", "replica", "rank"})


def of_engine(by: str, expr: str, function: str = "sum") -> str:
    """``expr`` of engines, whose series do not name their replica, by its labels and others of theirs."""
    return f"{function} by ({by}) ({_by_address(expr, by)} {_OF_ENGINE})"


def of_rank(expr: str) -> str:
    """``expr`` of rank processes, by replica and rank."""
    by = "replica, rank"
    return f"sum by ({by}) ({_by_address(expr, by)} {_OF_RANK})"


def _by_address(expr: str, by: str) -> str:
    """``expr`` with the labels of ``by`` that are its own; who has died is no part of who has its address now."""
    own = [label for label in by.split(", ") if label not in _OF_INFO]
    return f"max by ({', '.join(('job', 'instance', *own))}) ({expr})"
