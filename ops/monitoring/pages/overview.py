"""The overview: what clients feel, and whether everything is there."""

from __future__ import annotations

from ops.monitoring.pages.selecting import HERE, MODEL, MODEL_VARIABLE, NAMESPACE_VARIABLE
from ops.monitoring.panels import GREEN, RED, YELLOW, Dashboard, Panel, Query, Row, quantiles

REQUESTS = f"sum(rate(cluster_router_requests_total{{{MODEL}}}[$__rate_interval]))"
ACCOUNTABLE = f'cluster_router_requests_total{{{MODEL}, outcome!~"rejected_invalid|aborted_client"}}'
UNSERVED = (
    f"cluster_router_requests_total{{{MODEL}, "
    'outcome=~"failed_replica|failed_internal|rejected_unavailable|evicted_deadline"}'
)
GOODPUT = (
    f"sum by (model) (rate(cluster_router_goodput_requests_total{{{MODEL}}}[$__rate_interval])) "
    f"/ (sum by (model) (rate({ACCOUNTABLE}[$__rate_interval])) > 0)"
)
OUTCOMES = f"sum by (outcome) (rate(cluster_router_requests_total{{{MODEL}}}[$__rate_interval])) > 0"
FIRST_TOKEN = f"cluster_router_time_to_first_token_seconds_bucket{{{MODEL}}}"
BETWEEN_TOKENS = f"cluster_router_inter_token_latency_seconds_bucket{{{MODEL}}}"
TTFT_OBJECTIVE = Query(f"min(cluster_router_ttft_objective_seconds{{{HERE}}})", "objective")
TPOT_OBJECTIVE = Query(f"min(cluster_router_tpot_objective_seconds{{{HERE}}})", "objective")


def p95(buckets: str) -> str:
    return f"histogram_quantile(0.95, sum by (le) (rate({buckets}[$__rate_interval])))"


def tokens(kind: str) -> str:
    return f"sum by (model) (rate(cluster_router_{kind}_tokens_total{{{MODEL}}}[$__rate_interval]))"


GLANCE = (
    Panel(
        "Ready replicas", "Replicas that serve, of those that are asked for.",
        (
            Query(f'sum(cluster_replicas{{{MODEL}, phase="READY"}})', "ready"),
            Query(f"sum(cluster_desired_replicas{{{MODEL}}})", "desired"),
        ),
        width=4, height=5, stat=True,
    ),
    Panel(
        "Requests", "Requests that ended, however they did.", (Query(REQUESTS, "requests"),),
        unit="reqps", width=4, height=5, stat=True,
    ),
    Panel(
        "Goodput",
        "Share of requests that completed within both objectives. Those that were invalid or left by their client "
        "do not count.",
        (Query(GOODPUT, "{{model}}"),),
        unit="percentunit", width=4, height=5, stat=True, highest=1.0,
        colour=RED, thresholds=((0.9, YELLOW), (0.99, GREEN)),
    ),
    Panel(
        "Time to first token, p95", "From a request's arrival at the router to its first token.",
        (Query(p95(FIRST_TOKEN), "TTFT"),), unit="s", width=4, height=5, stat=True,
        thresholds=((1.0, YELLOW), (2.0, RED)),
    ),
    Panel(
        "Between tokens, p95", "Between two tokens of one stream, failovers included.",
        (Query(p95(BETWEEN_TOKENS), "ITL"),), unit="s", width=4, height=5, stat=True,
        thresholds=((0.1, YELLOW), (0.2, RED)),
    ),
    Panel(
        "Unserved requests",
        "Share of requests that ended for want of a replica, too late to start, or by a bug.",
        (Query(f"sum(rate({UNSERVED}[$__rate_interval])) / ({REQUESTS} > 0)", "unserved"),),
        unit="percentunit", width=4, height=5, stat=True, highest=1.0,
        thresholds=((0.01, YELLOW), (0.05, RED)),
    ),
)  # fmt: skip

REQUEST_PANELS = (
    Panel(
        "Requests by outcome", "Every request ends in exactly one outcome; docs/metrics.md says what each means.",
        (Query(OUTCOMES, "{{outcome}}"),),
        unit="reqps", stacked=True,
    ),
    Panel(
        "Goodput ratio", "Share of requests that completed within both objectives.", (Query(GOODPUT, "{{model}}"),),
        unit="percentunit", highest=1.0,
    ),
    Panel(
        "In flight", "Requests that run, and those among them that lost their replica and wait for another.",
        (
            Query(f"sum by (model) (cluster_router_requests_running{{{MODEL}}})", "running {{model}}"),
            Query(f"sum by (model) (cluster_router_queued_requests{{{MODEL}}})", "wait for a replica {{model}}"),
        ),
        decimals=0,
    ),
)  # fmt: skip

LATENCY_PANELS = (
    Panel(
        "Time to first token", "From a request's arrival at the router to its first token, beside the objective.",
        (*quantiles("cluster_router_time_to_first_token_seconds", MODEL, (), ""), TTFT_OBJECTIVE), unit="s",
    ),
    Panel(
        "Between tokens", "Inter-token latency, beside the objective for its mean over a request.",
        (*quantiles("cluster_router_inter_token_latency_seconds", MODEL, (), ""), TPOT_OBJECTIVE), unit="s",
    ),
    Panel(
        "Whole requests", "From arrival to the end; long answers take long.",
        quantiles("cluster_router_request_duration_seconds", MODEL, (), ""), unit="s",
    ),
)  # fmt: skip

REPLICA_PANELS = (
    Panel(
        "Tokens", "Prompt tokens sent to replicas and tokens generated for clients, each once whatever failed over.",
        (Query(tokens("generation"), "generated {{model}}"), Query(tokens("prompt"), "prompt {{model}}")),
        unit="suffix: tok/s",
    ),
    Panel(
        "Replicas by phase", "Where every replica is in its life.",
        (Query(f"sum by (phase) (cluster_replicas{{{MODEL}}}) > 0", "{{phase}}"),), stacked=True, decimals=0,
    ),
    Panel(
        "Failovers", "Replicas lost under a request, by how; the stream went on elsewhere.",
        (Query(f"sum by (reason) (rate(cluster_router_failovers_total{{{HERE}}}[$__rate_interval]))", "{{reason}}"),),
        unit="suffix: /s",
    ),
)  # fmt: skip

PAGE = Dashboard(
    name="overview",
    title="LLM cluster / Overview",
    description="What clients feel, and whether everything is there.",
    variables=(NAMESPACE_VARIABLE, MODEL_VARIABLE),
    rows=(
        Row("At a glance", GLANCE),
        Row("Requests", REQUEST_PANELS),
        Row("Latency", LATENCY_PANELS),
        Row("Work and replicas", REPLICA_PANELS),
    ),
)
