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

# Of one process for each address: a new one may have the port of another that was killed, whose series Prometheus keeps
# for some scrapes. A join with both fails, and with it every graph that has this moment in it.
OF_ENGINE = (
    f"* on (job, instance) group_left (model, replica) "
    f"topk by (job, instance) (1, cluster_engine_info{{{MODEL_AND_REPLICA}}})"
)
OF_RANK = (
    f"* on (job, instance) group_left (replica, rank) "
    f"topk by (job, instance) (1, cluster_rank_info{{{MODEL_AND_REPLICA}}})"
)


def of_engine(by: str, expr: str, function: str = "sum") -> str:
    """``expr`` of engines, whose series have no labels, by those of their replica."""
    return f"{function} by ({by}) ({expr} {OF_ENGINE})"


def of_rank(expr: str) -> str:
    """``expr`` of rank processes, by replica and rank."""
    return f"sum by (replica, rank) ({expr} {OF_RANK})"
