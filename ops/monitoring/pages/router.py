"""Routers: where requests go, what they wait for, what that costs."""

from __future__ import annotations

from ops.monitoring.pages.selecting import HERE, MODEL, MODEL_VARIABLE, NAMESPACE_VARIABLE
from ops.monitoring.panels import Dashboard, Panel, Query, Row, quantiles

ROUTERS = f"on (job, instance) cluster_router_ttft_objective_seconds{{{HERE}}}"  # every router shows it, nobody else

BY_ROUTER = f"sum by (instance) (rate(cluster_router_requests_total{{{MODEL}}}[$__rate_interval]))"


def picks(by: str) -> str:
    return f"sum by ({by}) (rate(cluster_router_endpoint_picks_total{{{HERE}}}[$__rate_interval]))"


def per_request(kind: str) -> str:
    return (
        f"sum by (model) (rate(cluster_router_{kind}_tokens_total{{{MODEL}}}[$__rate_interval])) "
        f"/ (sum by (model) (rate(cluster_router_queue_seconds_count{{{MODEL}}}[$__rate_interval])) > 0)"
    )


TRAFFIC = (
    Panel(
        "Requests by router", "Requests that ended, by router: how evenly clients spread over them.",
        (Query(BY_ROUTER, "{{instance}}"),),
        unit="reqps",
    ),
    Panel(
        "Requests refused", "Requests that never entered, by why.",
        (
            Query(
                f'sum by (outcome) (rate(cluster_router_requests_total{{{MODEL}, outcome=~"rejected_.*|evicted_.*"}}'
                "[$__rate_interval]))",
                "{{outcome}}",
            ),
        ),
        unit="reqps", stacked=True,
    ),
    Panel(
        "Running requests", "Requests that are valid and have not ended, by router.",
        (Query(f"sum by (instance) (cluster_router_requests_running{{{MODEL}}})", "{{instance}}"),), decimals=0,
    ),
    Panel(
        "Processes", "Processes of each router that listen, and how many died and were started again.",
        (
            Query(f"cluster_router_processes{{{HERE}}}", "{{instance}}"),
            Query(
                f"increase(cluster_router_process_restarts_total{{{HERE}}}[$__rate_interval])", "restarts {{instance}}"
            ),
        ),
        decimals=0, width=24,
    ),
)  # fmt: skip

CHOOSING = (
    Panel(
        "Requests by replica", "Where requests were sent; failovers are sent again.",
        (Query(picks("replica"), "{{replica}}"),),
        unit="reqps", stacked=True,
    ),
    Panel(
        "Decided by", "Which scorer spoke loudest for the replica that was taken; 'only' when there was no choice.",
        (Query(picks("scorer"), "{{scorer}}"),),
        unit="reqps", stacked=True,
    ),
    Panel(
        "Endpoints", "Replicas that take new requests, as each router sees them; routers that differ are cut off.",
        (Query(f"max by (instance, model) (cluster_router_endpoints{{{MODEL}}})", "{{model}} at {{instance}}"),),
        decimals=0,
    ),
)  # fmt: skip

TRUST = (
    Panel(
        "Not trusted", "1: a router finds the replica slow or has ejected it: it gets probes, no other new requests.",
        (
            Query(
                f'max by (replica, standing) (cluster_router_endpoint_standing{{{HERE}, standing!="healthy"}})',
                "{{replica}} {{standing}}",
            ),
        ),
        decimals=0,
    ),
    Panel(
        "Taken out", "How often replicas lost a router's trust, by what they did.",
        (Query(f"sum by (reason) (rate(cluster_router_ejections_total{{{HERE}}}[$__rate_interval]))", "{{reason}}"),),
        unit="suffix: /s",
    ),
    Panel(
        "Retries refused", "Requests that lost their replica and were not sent to another, by why.",
        (
            Query(
                f"sum by (reason) (rate(cluster_router_retries_refused_total{{{HERE}}}[$__rate_interval]))",
                "{{reason}}",
            ),
        ),
        unit="reqps",
    ),
)  # fmt: skip

CACHES = (
    Panel(
        "Cached prompt tokens", "What routers thought to be cached where they sent a request, and what was.",
        (
            Query(
                f"sum(rate(cluster_router_expected_cached_prompt_tokens_total{{{MODEL}}}[$__rate_interval]))",
                "expected",
            ),
            Query(f"sum(rate(cluster_router_cached_prompt_tokens_total{{{MODEL}}}[$__rate_interval]))", "found"),
        ),
        unit="suffix: tok/s",
    ),
    Panel(
        "Known blocks", "KV blocks of which a router knows who holds them.",
        (Query(f"max by (instance, model) (cluster_router_prefix_index_blocks{{{MODEL}}})", "{{model}} {{instance}}"),),
        decimals=0,
    ),
    Panel(
        "Index", "Blocks forgotten because an index was full; full accounts asked for because news were missing.",
        (
            Query(f"sum(rate(cluster_router_prefix_index_dropped_total{{{MODEL}}}[$__rate_interval]))", "forgotten"),
            Query(f"sum(rate(cluster_router_prefix_index_resyncs_total{{{MODEL}}}[$__rate_interval]))", "resyncs"),
        ),
        unit="suffix: /s",
    ),
)  # fmt: skip

WAITING = (
    Panel(
        "Before being sent", "From arrival to being sent to a replica: tokenizing and waiting.",
        quantiles("cluster_router_queue_seconds", MODEL, (), ""), unit="s", width=6,
    ),
    Panel(
        "Waiting requests", "Requests that wait for a replica with room, those that lost one included.",
        (Query(f"sum by (model) (cluster_router_queued_requests{{{MODEL}}})", "{{model}}"),), decimals=0, width=6,
    ),
    Panel(
        "Waiting prompt tokens", "Prompt tokens of those requests: what replicas will have to compute.",
        (Query(f"sum by (model) (cluster_router_queued_prompt_tokens{{{MODEL}}})", "{{model}}"),), decimals=0, width=6,
    ),
    Panel(
        "Failovers", "Replicas lost under a request, by how.",
        (Query(f"sum by (reason) (rate(cluster_router_failovers_total{{{HERE}}}[$__rate_interval]))", "{{reason}}"),),
        unit="suffix: /s", width=6,
    ),
)  # fmt: skip

COST = (
    Panel(
        "Tokens per request", "How long prompts and answers are on average.",
        (
            Query(per_request("prompt"), "prompt {{model}}"),
            Query(per_request("generation"), "generated {{model}}"),
        ),
        unit="suffix: tok", width=6,
    ),
    Panel(
        "CPU", "CPU seconds per second of each router's process; it is one core at most.",
        (Query(f"rate(process_cpu_seconds_total[$__rate_interval]) and {ROUTERS}", "{{instance}}"),),
        unit="percentunit", width=6, thresholds=((0.8, "red"),),
    ),
    Panel(
        "Memory", "Resident memory of each router's process.",
        (Query(f"process_resident_memory_bytes and {ROUTERS}", "{{instance}}"),), unit="bytes", width=6,
    ),
    Panel(
        "Open files", "Of each router's process: streams, mostly.",
        (Query(f"process_open_fds and {ROUTERS}", "{{instance}}"),), width=6, decimals=0,
    ),
)  # fmt: skip

PAGE = Dashboard(
    name="router",
    title="LLM cluster / Routers",
    description="Where requests go, what they wait for, and what that costs.",
    variables=(NAMESPACE_VARIABLE, MODEL_VARIABLE),
    rows=(
        Row("Traffic", TRAFFIC),
        Row("Choosing a replica", CHOOSING),
        Row("Waiting", WAITING),
        Row("Trust", TRUST),
        Row("Prefix caches", CACHES),
        Row("Cost", COST),
    ),
)
