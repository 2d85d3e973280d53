"""Every metric, declared once. A process builds the groups it needs on one registry.

Labels come from closed sets (model, replica slot, outcome ...): never an id of a request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)

# Gauges that every process of one router shows alike: together they are the largest, all others are sums.
ALIKE_IN_PROCESSES = frozenset(
    {
        "cluster_router_endpoints",
        "cluster_router_endpoint_standing",
        "cluster_router_ttft_objective_seconds",
        "cluster_router_tpot_objective_seconds",
    }
)


# Series that one thread alone adds to, the event loop's. So they need no lock, which prometheus_client takes for each
# number, nor its question what the child is; a scrape in another thread reads one number or the next.


class Count:
    """A counter's or a gauge's series."""

    __slots__ = ("_value",)

    def __init__(self, child: Counter | Gauge) -> None:
        """``child`` has all of its labels."""
        self._value = child._value  # noqa: SLF001

    def inc(self, amount: float) -> None:
        self._value._value += amount  # noqa: SLF001


class Observations:
    """A histogram's series: what ``Histogram.observe`` does for each number, once for several that are alike."""

    __slots__ = ("_bounds", "_buckets", "_sum")

    def __init__(self, histogram: Histogram) -> None:
        """``histogram`` has all of its labels."""
        self._bounds, self._buckets, self._sum = histogram._upper_bounds, histogram._buckets, histogram._sum  # noqa: SLF001

    def observe(self, value: float, times: int = 1) -> None:
        self._sum._value += value * times  # noqa: SLF001
        self._buckets[bisect_left(self._bounds, value)]._value += times  # noqa: SLF001


Metric = TypeVar("Metric", Counter | Gauge, Histogram)
Series = TypeVar("Series")


class Children(dict[tuple[str, ...], Series]):
    """The series of one metric by the values of its labels; each is looked up, and begun, once.

    Half of what counting costs is finding what to count. To be dropped whenever series of the metric are removed: one
    that is kept would go on counting unseen.
    """

    def __init__(self, metric: Metric, series: Callable[[Metric], Series]) -> None:
        super().__init__()
        self._begin: Callable[[tuple[str, ...]], Series] = lambda values: series(metric.labels(*values))

    def __missing__(self, values: tuple[str, ...]) -> Series:
        self[values] = begun = self._begin(values)
        return begun


class RouterMetrics:
    """What clients feel: requests, their latencies, and where they went.

    What every request counts is at hand by label values, too: ``of_request``.
    """

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
        self.queued_prompt_tokens = Gauge(
            f"{prefix}_queued_prompt_tokens", "Prompt tokens of the requests that wait for a replica.", ["model"],
            registry=registry,
        )  # fmt: skip
        self.failovers = Counter(
            f"{prefix}_failovers", "Replicas that were lost under a request, by how.", ["reason"], registry=registry
        )
        self.endpoint_picks = Counter(
            f"{prefix}_endpoint_picks", "Requests sent, by replica and deciding scorer.", ["replica", "scorer"],
            registry=registry,
        )  # fmt: skip
        self.endpoint_standing = Gauge(
            f"{prefix}_endpoint_standing", "1 for what a replica is to this router now: healthy, slow or ejected.",
            ["replica", "standing"], registry=registry,
        )  # fmt: skip
        self.ejections = Counter(
            f"{prefix}_ejections", "Replicas that got no new requests for a while, by what they did.", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.retries_refused = Counter(
            f"{prefix}_retries_refused", "Requests that lost their replica and were not sent to another, by why.",
            ["reason"], registry=registry,
        )  # fmt: skip
        self.prefix_index_blocks = Gauge(
            f"{prefix}_prefix_index_blocks", "KV blocks of which the router knows who holds them.", ["model"],
            registry=registry,
        )  # fmt: skip
        self.prefix_index_dropped = Counter(
            f"{prefix}_prefix_index_dropped", "KV blocks that the router forgot because its index was full.", ["model"],
            registry=registry,
        )  # fmt: skip
        self.prefix_index_resyncs = Counter(
            f"{prefix}_prefix_index_resyncs", "Full accounts of KV blocks asked for because news were missing.",
            ["model"], registry=registry,
        )  # fmt: skip
        self.expected_cached_tokens = Counter(
            f"{prefix}_expected_cached_prompt_tokens",
            "Prompt tokens of completed requests that the router thought to be cached where it sent them.", ["model"],
            registry=registry,
        )  # fmt: skip
        self.cached_tokens = Counter(
            f"{prefix}_cached_prompt_tokens", "Those that replicas did find in their caches.", ["model"],
            registry=registry,
        )  # fmt: skip
        self.goodput_requests = Counter(
            f"{prefix}_goodput_requests", "Completed requests that met both objectives.", ["model"], registry=registry
        )
        self.prompt_tokens = Counter(
            f"{prefix}_prompt_tokens", "Prompt tokens of requests sent to a replica, once each.", ["model"],
            registry=registry,
        )  # fmt: skip
        self.generation_tokens = Counter(
            f"{prefix}_generation_tokens", "Tokens generated for clients, once each however often they were replayed.",
            ["model"], registry=registry,
        )  # fmt: skip
        self.running = Gauge(
            f"{prefix}_requests_running", "Requests that are valid and have not ended.", ["model"], registry=registry
        )
        self.endpoints = Gauge(
            f"{prefix}_endpoints", "Replicas that take new requests from this router.", ["model"], registry=registry
        )
        self.processes = Gauge(f"{prefix}_processes", "Processes of this router that listen.", registry=registry)
        self.process_restarts = Counter(
            f"{prefix}_process_restarts", "Processes of this router that died and were started again.",
            registry=registry,
        )  # fmt: skip
        self.ttft_objective = Gauge(
            f"{prefix}_ttft_objective_seconds", "Highest time to first token that counts as good.", registry=registry
        )
        self.tpot_objective = Gauge(
            f"{prefix}_tpot_objective_seconds", "Highest mean time per later token that counts as good.",
            registry=registry,
        )  # fmt: skip
        self.of_request = RequestSeries(self)

    def forget(self, label: str, values: Collection[str]) -> None:
        """Models or replicas are gone, and so are their series."""
        gone = frozenset(values)
        for metric in self._of(label):
            place = metric._labelnames.index(label)  # noqa: SLF001 - remove_by_labels looks at all for each value
            for labels in _labels_of(metric):
                if labels[place] in gone:
                    metric.remove(*labels)
        self.of_request = RequestSeries(self)

    def shown(self, label: str) -> frozenset[str]:
        """The models or replicas that have series."""
        found: set[str] = set()
        for metric in self._of(label):
            place = metric._labelnames.index(label)  # noqa: SLF001
            found.update(labels[place] for labels in _labels_of(metric))
        return frozenset(found)

    def _of(self, label: str) -> tuple[Counter | Gauge | Histogram, ...]:
        return self.of_model if label == "model" else (self.endpoint_picks, self.endpoint_standing)

    @property
    def of_model(self) -> tuple[Counter | Gauge | Histogram, ...]:
        """Those with a label ``model``: they come and go with it."""
        return (
            self.requests, self.time_to_first_token, self.inter_token_latency, self.request_duration,
            self.queue_seconds, self.queued_requests, self.queued_prompt_tokens, self.goodput_requests,
            self.prompt_tokens, self.generation_tokens, self.running, self.endpoints,
            self.prefix_index_blocks, self.prefix_index_dropped, self.prefix_index_resyncs,
            self.expected_cached_tokens, self.cached_tokens,
        )  # fmt: skip


def _labels_of(metric: Counter | Gauge | Histogram) -> list[Sequence[str]]:
    """The values of the labels of its series. prometheus_client shows them to nobody but a scrape."""
    with metric._lock:  # noqa: SLF001
        return list(metric._metrics)  # noqa: SLF001


class RequestSeries:
    """Series of what every request counts: by model, ``requests`` by model and outcome, picks by replica and scorer.

    For one look at a time: what leaves with a model or a replica is not to be kept.
    """

    def __init__(self, metrics: RouterMetrics) -> None:
        self.requests = Children(metrics.requests, Count)
        self.request_duration = Children(metrics.request_duration, Observations)
        self.time_to_first_token = Children(metrics.time_to_first_token, Observations)
        self.inter_token_latency = Children(metrics.inter_token_latency, Observations)
        self.queue_seconds = Children(metrics.queue_seconds, Observations)
        self.goodput_requests = Children(metrics.goodput_requests, Count)
        self.prompt_tokens = Children(metrics.prompt_tokens, Count)
        self.generation_tokens = Children(metrics.generation_tokens, Count)
        self.expected_cached_tokens = Children(metrics.expected_cached_tokens, Count)
        self.cached_tokens = Children(metrics.cached_tokens, Count)
        self.running = Children(metrics.running, Count)
        self.endpoint_picks = Children(metrics.endpoint_picks, Count)


class EngineMetrics:
    """A leader's scheduler and KV cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "cluster_engine"
        self.info = Gauge(
            f"{prefix}_info", "1; joins the other series of this process to their replica.", ["model", "replica"],
            registry=registry,
        )  # fmt: skip
        self.running = Gauge(f"{prefix}_num_requests_running", "Sequences in the running batch.", registry=registry)
        self.waiting = Gauge(f"{prefix}_num_requests_waiting", "Sequences that wait to be admitted.", registry=registry)
        self.kv_cache_usage = Gauge(
            f"{prefix}_kv_cache_usage_ratio", "Share of the KV blocks in use.", registry=registry
        )
        self.kv_blocks = Gauge(f"{prefix}_kv_blocks", "KV blocks of the cache, used or not.", registry=registry)
        self.prompt_tokens = Counter(f"{prefix}_prompt_tokens", "Prompt tokens computed.", registry=registry)
        self.generation_tokens = Counter(f"{prefix}_generation_tokens", "Tokens generated.", registry=registry)
        self.preemptions = Counter(
            f"{prefix}_preemptions", "Sequences put back to waiting for want of KV blocks.", registry=registry
        )
        self.overlapped_steps = Counter(
            f"{prefix}_overlapped_steps", "Steps that began while another one was outstanding, as pipeline stages do.",
            registry=registry,
        )  # fmt: skip
        self.prefix_cache_queries = Counter(
            f"{prefix}_prefix_cache_queries",
            "Tokens looked up in the prefix cache.",
            registry=registry,
        )
        self.prefix_cache_hits = Counter(
            f"{prefix}_prefix_cache_hits", "Tokens found in the prefix cache, and not computed again.",
            registry=registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            f"{prefix}_step_seconds", "One step, by what it held (prefill, decode, mixed).", ["kind"],
            buckets=STEP_BUCKETS_S, registry=registry,
        )  # fmt: skip


class RankMetrics:
    """One rank's progress. The values are asked for at each scrape, so that none goes stale."""

    def __init__(self, registry: CollectorRegistry) -> None:
        who = ["replica", "rank"]
        self.info = Gauge(
            "cluster_rank_info", "1; joins the other series of this process to their rank.",
            ["model", *who, "node", "device"], registry=registry,
        )  # fmt: skip
        self.step = Gauge("cluster_rank_step", "Steps this rank has finished.", who, registry=registry)
        self.step_age = Gauge(
            "cluster_rank_step_age_seconds", "How long the step now running has run; 0 when idle.", who,
            registry=registry,
        )  # fmt: skip
        self.state = Gauge(
            "cluster_rank_state", "1 for the state this rank is in.", [*who, "node", "state"], registry=registry
        )
        self.bytes_loaded = Gauge(
            "cluster_rank_loaded_bytes", "Bytes of the shard read so far.", who, registry=registry
        )
        self.bytes_total = Gauge("cluster_rank_shard_bytes", "Bytes of the whole shard.", who, registry=registry)
        self.peak_host_bytes = Gauge(
            "cluster_rank_loading_peak_host_bytes", "Highest host memory that loading the shard has added.", who,
            registry=registry,
        )  # fmt: skip


class ControllerMetrics:
    """Desired against observed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.replicas = Gauge("cluster_replicas", "Replicas by phase.", ["model", "phase"], registry=registry)
        self.desired_replicas = Gauge(
            "cluster_desired_replicas", "Replicas that are asked for.", ["model"], registry=registry
        )
        self.failures = Gauge(
            "cluster_replica_failures_in_a_row", "Failures of a replica since it was last ready for a while.",
            ["model", "replica"], registry=registry,
        )  # fmt: skip
        self.oldest_report = Gauge(
            "cluster_oldest_rank_report_seconds", "Age of the oldest last report of a model's ranks.", ["model"],
            registry=registry,
        )  # fmt: skip
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


class NodeMetrics:
    """One machine of the cluster, told by its worker process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.up = Gauge("cluster_node_up", "1 while this machine is a node of the cluster.", registry=registry)
        self.ranks = Gauge("cluster_node_ranks", "Rank processes on this machine.", ["phase"], registry=registry)
