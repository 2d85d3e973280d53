"""Ranks and the controller: who lives, who lags, who loads, and what is done about it."""

from __future__ import annotations

from ops.monitoring.pages.selecting import (
    HERE,
    MODEL,
    MODEL_VARIABLE,
    NAMESPACE_VARIABLE,
    RANKS_REPLICA_VARIABLE,
    REPLICA,
    of_rank,
)
from ops.monitoring.panels import Dashboard, Panel, Query, Row, quantiles

RANK = "{{replica}} rank {{rank}}"
BLOCKED = f"max by (model, reason) (cluster_placement_blocked{{{MODEL}}})"
PACE = f"max by (replica, rank) (clamp_min(deriv(cluster_rank_step{{{REPLICA}}}[$__rate_interval]), 0))"
LAG = f"max by (replica) (cluster_rank_step{{{REPLICA}}}) - min by (replica) (cluster_rank_step{{{REPLICA}}})"

LIVES = (
    Panel(
        "Ranks by state", "Where every rank is in its life.",
        (Query(f"sum by (state) (cluster_rank_state{{{REPLICA}}}) > 0", "{{state}}"),), stacked=True, decimals=0,
    ),
    Panel(
        "Oldest report", "Age of the oldest last report of each model's ranks; they report twice a second.",
        (Query(f"max by (model) (cluster_oldest_rank_report_seconds{{{MODEL}}})", "{{model}}"),), unit="s",
        thresholds=((5.0, "red"),),
    ),
    Panel(
        "Failures in a row", "Of each replica since it was last ready for a while; pauses double with each.",
        (Query(f"max by (replica) (cluster_replica_failures_in_a_row{{{MODEL}}})", "{{replica}}"),), decimals=0,
        thresholds=((3.0, "red"),),
    ),
)  # fmt: skip

STEPS = (
    Panel(
        "Steps", "Steps that each rank finishes; all ranks of a replica run the same ones.",
        (Query(PACE, RANK),), unit="suffix: /s",
    ),
    Panel(
        "Lag inside a replica", "Steps between the first and the last rank of each replica.",
        (
            Query(
                LAG,
                "{{replica}}",
            ),
        ),
        decimals=0,
    ),
    Panel(
        "Age of the running step", "A step that runs for controller.step_deadline_s hangs, and its replica is rebuilt.",
        (Query(f"max by (replica, rank) (cluster_rank_step_age_seconds{{{REPLICA}}})", RANK),), unit="s",
        thresholds=((30.0, "red"),),
    ),
)  # fmt: skip

MEMORY = (
    Panel(
        "Shard loaded", "Share of its shard that each rank has read.",
        (
            Query(
                f"max by (replica, rank) (cluster_rank_loaded_bytes{{{REPLICA}}}) / "
                f"(max by (replica, rank) (cluster_rank_shard_bytes{{{REPLICA}}}) > 0)",
                RANK,
            ),
        ),
        unit="percentunit", highest=1.0,
    ),
    Panel(
        "Shard and what loading it took", "Bytes of each shard, and the most host memory that loading it has added.",
        (
            Query(f"max by (replica, rank) (cluster_rank_shard_bytes{{{REPLICA}}})", f"shard {RANK}"),
            Query(f"max by (replica, rank) (cluster_rank_loading_peak_host_bytes{{{REPLICA}}})", f"peak {RANK}"),
        ),
        unit="bytes",
    ),
    Panel(
        "Memory of the process", "Resident host memory of each rank.",
        (Query(of_rank("process_resident_memory_bytes"), RANK),), unit="bytes",
    ),
    Panel(
        "CPU of the process", "CPU seconds per second of each rank.",
        (Query(of_rank("rate(process_cpu_seconds_total[$__rate_interval])"), RANK),), unit="percentunit",
    ),
    Panel(
        "Targets that answer", "Processes that Prometheus can scrape, of those it knows.",
        (
            Query(f'sum(up{{{HERE}, job=~".*llm-cluster.*"}})', "up"),
            Query(f'count(up{{{HERE}, job=~".*llm-cluster.*"}})', "known"),
        ),
        decimals=0,
    ),
    Panel(
        "Nodes", "Nodes that are part of the cluster, and the ranks on them. Told by worker processes only.",
        (
            Query(f"sum(cluster_node_up{{{HERE}}}) or vector(0)", "nodes"),
            Query(f"sum(cluster_node_ranks{{{HERE}}}) or vector(0)", "ranks"),
        ),
        decimals=0,
    ),
)  # fmt: skip

CONTROLLER = (
    Panel(
        "Phase changes", "Of replicas, by where to and why.",
        (
            Query(
                f"sum by (to, reason) (increase(cluster_replica_transitions_total{{{HERE}}}[5m]))",
                "{{to}}: {{reason}}",
            ),
        ),
        unit="suffix:  in 5 min", width=6,
    ),
    Panel(
        "One pass", "Observe, reconcile, act: how long the controller takes.",
        quantiles("cluster_reconcile_seconds", HERE, (), ""), unit="s", width=6,
    ),
    Panel(
        "Calls to Ray", "None in fault-free steady state: Ray places, and never carries a token.",
        (Query(f"sum by (call) (rate(cluster_controller_ray_calls_total{{{HERE}}}[$__rate_interval]))", "{{call}}"),),
        unit="suffix: /s", width=6,
    ),
    Panel(
        "Placement blocked", "1 while a model's replica finds no place.",
        (Query(BLOCKED, "{{model}} {{reason}}"),), decimals=0, width=6,
    ),
)  # fmt: skip

PAGE = Dashboard(
    name="ranks",
    title="LLM cluster / Ranks and controller",
    description="Who lives, who lags, who loads, and what is done about it.",
    variables=(NAMESPACE_VARIABLE, MODEL_VARIABLE, RANKS_REPLICA_VARIABLE),
    rows=(
        Row("Lives", LIVES),
        Row("Steps", STEPS),
        Row("Memory and processes", MEMORY),
        Row("Controller", CONTROLLER),
    ),
)
