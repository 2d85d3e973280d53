"""Every metric, declared once. A process builds the groups it needs on one registry.

Labels come from closed sets (model, replica slot, outcome ...): never an id of a request.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)


class RouterMetrics:
    """What clients feel: requests, their latencies, and where they went."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "cluster_router"
        self.requests = Counter(
            f"{prefix}_requests", "Requests by how they ended.", ["model", "outcome"], registry=registry
        )
        self.time_to_first_token = Histogram(
            f"{prefix}_time_to_first_token_seconds", "From arrival to the first token.", ["model"],
            buckets=LATENCY_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.inter_token_latency = Histogram(
            f"{prefix}_inter_token_latency_seconds", "Between two tokens of one stream.", ["model"],
            buckets=LATENCY_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.request_duration = Histogram(
            f"{prefix}_request_duration_seconds", "From arrival to the end.", ["model"],
            buckets=LATENCY_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            f"{prefix}_queue_seconds", "From arrival to being sent to a replica.", ["model"],
            buckets=LATENCY_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.queued_requests = Gauge(
            f"{prefix}_queued_requests", "Requests that wait for a replica.", ["model"], registry=registry
        )
        self.failovers = Counter(
            f"{prefix}_failovers", "Replicas that were lost under a request, by how.", ["reason"], registry=registry
        )
        self.endpoint_picks = Counter(
            f"{prefix}_endpoint_picks", "Requests sent, by replica and deciding scorer.", ["replica", "scorer"],
            registry=registry,
        )  # fmt: skip


class EngineMetrics:
    """A leader's scheduler and KV cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "cluster_engine"
        self.running = Gauge(f"{prefix}_num_requests_running", "Sequences in the running batch.", registry=registry)
        self.waiting = Gauge(f"{prefix}_num_requests_waiting", "Sequences that wait to be admitted.", registry=registry)
        self.kv_cache_usage = Gauge(f"{prefix}_kv_cache_usage_ratio", "KV blocks in use.", registry=registry)
        self.prompt_tokens = Counter(f"{prefix}_prompt_tokens", "Prompt tokens computed.", registry=registry)
        self.generation_tokens = Counter(f"{prefix}_generation_tokens", "Tokens generated.", registry=registry)
        self.preemptions = Counter(
            f"{prefix}_preemptions", "Sequences put back to waiting for want of KV blocks.", registry=registry
        )
        self.step_seconds = Histogram(
            f"{prefix}_step_seconds", "One step, by what it held (prefill, decode, mixed).", ["kind"],
            buckets=STEP_BUCKETS_S, registry=registry,
        )  # fmt: skip


class RankMetrics:
    """One rank's progress."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.step = Gauge("cluster_rank_step", "Steps this rank has finished.", ["replica", "rank"], registry=registry)
        self.state = Gauge(
            "cluster_rank_state", "1 for the state this rank is in.", ["replica", "rank", "node", "state"],
            registry=registry,
        )  # fmt: skip
        self.bytes_loaded = Gauge(
            "cluster_rank_loaded_bytes", "Bytes of the shard read so far.", ["replica", "rank"], registry=registry
        )


class ControllerMetrics:
    """Desired against observed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.replicas = Gauge("cluster_replicas", "Replicas by phase.", ["model", "phase"], registry=registry)
        self.transitions = Counter(
            "cluster_replica_transitions", "Phase changes.", ["from", "to", "reason"], registry=registry
        )
        self.reconcile_seconds = Histogram(
            "cluster_reconcile_seconds", "One pass of observe, reconcile, act.",
            buckets=LATENCY_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.placement_blocked = Gauge(
            "cluster_placement_blocked", "1 while a model cannot be placed.", ["model", "reason"], registry=registry
        )
        self.ray_calls = Counter(
            "cluster_controller_ray_calls",
            "Calls to Ray; none in fault-free steady state.",
            ["call"],
            registry=registry,
        )
