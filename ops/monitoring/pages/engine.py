"""Engines: the batch, the KV cache and the steps of every replica."""

from __future__ import annotations

from ops.monitoring.pages.selecting import (
    MODEL_VARIABLE,
    NAMESPACE_VARIABLE,
    REPLICA_VARIABLE,
    of_engine,
)
from ops.monitoring.panels import Dashboard, Panel, Query, Row

BY_REPLICA = "model, replica"
USED_BLOCKS = "cluster_engine_kv_cache_usage_ratio * cluster_engine_kv_blocks"
GENERATED = "rate(cluster_engine_generation_tokens_total[$__rate_interval])"
PREFIX_HITS = "rate(cluster_engine_prefix_cache_hits_total[$__rate_interval])"
PREFIX_QUERIES = "rate(cluster_engine_prefix_cache_queries_total[$__rate_interval])"
OVERLAPPED = "rate(cluster_engine_overlapped_steps_total[$__rate_interval])"
STEPS = "rate(cluster_engine_step_seconds_bucket[$__rate_interval])"


def step_quantile(quantile: float, by: str) -> str:
    return f"histogram_quantile({quantile}, {of_engine(f'le, {by}', STEPS)})"


BATCH = (
    Panel(
        "Running", "Sequences in the running batch.",
        (Query(of_engine(BY_REPLICA, "cluster_engine_num_requests_running"), "{{replica}}"),), decimals=0,
    ),
    Panel(
        "Waiting", "Sequences that wait to be admitted: for KV blocks, or for a place in the batch.",
        (Query(of_engine(BY_REPLICA, "cluster_engine_num_requests_waiting"), "{{replica}}"),), decimals=0,
    ),
    Panel(
        "Preemptions", "Sequences put back to waiting for want of KV blocks; each is computed again.",
        (Query(of_engine(BY_REPLICA, "rate(cluster_engine_preemptions_total[$__rate_interval])"), "{{replica}}"),),
        unit="suffix: /s",
    ),
)  # fmt: skip

CACHE = (
    Panel(
        "KV cache in use", "Share of the KV blocks that hold tokens of running sequences.",
        (Query(of_engine(BY_REPLICA, "cluster_engine_kv_cache_usage_ratio", "max"), "{{replica}}"),),
        unit="percentunit", highest=1.0, thresholds=((0.95, "red"),),
    ),
    Panel(
        "KV blocks in use", "The same in blocks, beside how many there are.",
        (
            Query(of_engine(BY_REPLICA, USED_BLOCKS), "used {{replica}}"),
            Query(of_engine(BY_REPLICA, "cluster_engine_kv_blocks"), "all {{replica}}"),
        ),
        decimals=0,
    ),
    Panel(
        "Steps", "Engine steps by what they hold.",
        (
            Query(
                of_engine("replica, kind", "rate(cluster_engine_step_seconds_count[$__rate_interval])"),
                "{{kind}} {{replica}}",
            ),
        ),
        unit="suffix: /s",
    ),
)  # fmt: skip

PREFIXES = (
    Panel(
        "Prompt tokens from the cache", "Share of the prompt tokens looked up that were not computed again.",
        (
            Query(
                f"{of_engine(BY_REPLICA, PREFIX_HITS)} / ({of_engine(BY_REPLICA, PREFIX_QUERIES)} > 0)", "{{replica}}"
            ),
        ),
        unit="percentunit", highest=1.0,
    ),
    Panel(
        "Overlapped steps", "Share of the steps that began beside another one, as those of pipeline stages should.",
        (
            Query(
                f"{of_engine(BY_REPLICA, OVERLAPPED)} / "
                f"({of_engine(BY_REPLICA, 'rate(cluster_engine_step_seconds_count[$__rate_interval])')} > 0)",
                "{{replica}}",
            ),
        ),
        unit="percentunit", highest=1.0,
    ),
)  # fmt: skip

SPEED = (
    Panel(
        "Tokens generated", "What each replica samples, replays after failovers included.",
        (Query(of_engine(BY_REPLICA, GENERATED), "{{replica}}"),),
        unit="suffix: tok/s", stacked=True,
    ),
    Panel(
        "Prompt tokens computed", "Prefill work, that of resumed and preempted sequences included.",
        (Query(of_engine(BY_REPLICA, "rate(cluster_engine_prompt_tokens_total[$__rate_interval])"), "{{replica}}"),),
        unit="suffix: tok/s", stacked=True,
    ),
    Panel(
        "Tokens per step", "How well steps are filled: more is cheaper per token.",
        (
            Query(
                f"{of_engine(BY_REPLICA, GENERATED)} / "
                f"({of_engine(BY_REPLICA, 'rate(cluster_engine_step_seconds_count[$__rate_interval])')} > 0)",
                "{{replica}}",
            ),
        ),
        unit="suffix: tok",
    ),
    Panel(
        "Step time, p50", "Half of the steps take less, by what they hold.",
        (Query(step_quantile(0.5, "kind"), "{{kind}}"),), unit="s",
    ),
    Panel(
        "Step time, p99", "The slow steps, by what they hold.",
        (Query(step_quantile(0.99, "kind"), "{{kind}}"),), unit="s",
    ),
    Panel(
        "Step time by replica, p95", "A replica that is slower than its peers has a slow node or longer prompts.",
        (Query(step_quantile(0.95, "replica"), "{{replica}}"),), unit="s",
    ),
)  # fmt: skip

PAGE = Dashboard(
    name="engine",
    title="LLM cluster / Engines",
    description="The batch, the KV cache and the steps of every replica.",
    variables=(NAMESPACE_VARIABLE, MODEL_VARIABLE, REPLICA_VARIABLE),
    rows=(
        Row("Batch", BATCH),
        Row("KV cache and steps", CACHE),
        Row("Prefixes and stages", PREFIXES),
        Row("Speed", SPEED),
    ),
)
