"""What a leader's Prometheus series learn of each step: a few additions; gauges are asked for at the scrape."""

from __future__ import annotations

from typing import Protocol

from cluster.engine.progress import RankProgress
from cluster.engine.step import StepKind
from cluster.telemetry.metrics import EngineMetrics


class SchedulerCounts(Protocol):
    """What a scheduler counts, from its beginning on. Prefix cache: in tokens of prompts."""

    @property
    def preemptions(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...


class StepSeries:
    """Writes ``metrics``; ``progress`` holds the load that gauges tell. Used by the compute thread alone."""

    def __init__(self, metrics: EngineMetrics, counts: SchedulerCounts, progress: RankProgress) -> None:
        self._metrics, self._counts = metrics, counts
        self._seen = (0, 0, 0)
        kinds: tuple[StepKind, ...] = ("prefill", "decode", "mixed")
        self._step_seconds = {kind: metrics.step_seconds.labels(kind) for kind in kinds}
        metrics.running.set_function(lambda: progress.load.running_sequences)
        metrics.waiting.set_function(lambda: progress.load.waiting_sequences)
        metrics.kv_cache_usage.set_function(lambda: _share(progress.load.kv_blocks_used, progress.load.kv_blocks_total))

    def overlapped(self) -> None:
        """A step begins beside another one."""
        self._metrics.overlapped_steps.inc()

    def observe(self, kind: StepKind, prompt_tokens: int, generated_tokens: int, seconds: float) -> None:
        """A step has been committed."""
        metrics, counts = self._metrics, self._counts
        self._step_seconds[kind].observe(seconds)
        metrics.generation_tokens.inc(generated_tokens)
        if prompt_tokens:
            metrics.prompt_tokens.inc(prompt_tokens)
        now = (counts.preemptions, counts.prefix_queries, counts.prefix_hits)
        if now != self._seen:
            preemptions, queries, hits = (new - old for new, old in zip(now, self._seen, strict=True))
            metrics.preemptions.inc(preemptions)
            metrics.prefix_cache_queries.inc(queries)
            metrics.prefix_cache_hits.inc(hits)
            self._seen = now


def _share(used: int, total: int) -> float:
    return used / total if total else 0.0
