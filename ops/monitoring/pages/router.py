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

WAITING = (
    Panel(
        "Before being sent", "From arrival to being sent to a replica: admission and tokenizing.",
        quantiles("cluster_router_queue_seconds", MODEL, (), ""), unit="s",
    ),
    Panel(
        "Waiting for another replica", "Requests that lost their replica and wait for a ready one.",
        (Query(f"sum by (model) (cluster_router_queued_requests{{{MODEL}}})", "{{model}}"),), decimals=0,
    ),
    Panel(
        "Failovers", "Replicas lost under a request, by how.",
        (Query(f"sum by (reason) (rate(cluster_router_failovers_total{{{HERE}}}[$__rate_interval]))", "{{reason}}"),),
        unit="suffix: /s",
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
        Row("Cost", COST),
    ),
)
