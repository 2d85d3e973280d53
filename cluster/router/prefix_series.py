"""What a router shows of its prefix indexes (adapter: Prometheus)."""

from __future__ import annotations

from cluster.router.prefix_index import PrefixIndex
from cluster.telemetry.metrics import RouterMetrics


class PrefixSeries:
    """Follows every index that is told something. While a model has several, of two checkpoints, the last one counts.

    News come ten times a second from each busy replica, so this is no place for anything slow.
    """

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    def observe(self, model: str, index: PrefixIndex) -> None:
        """After ``index``, of ``model``, has been told something."""
        metrics = self._metrics
        metrics.prefix_index_blocks.labels(model=model).set(len(index))
        dropped, resyncs = index.take_counts()
        if dropped:
            metrics.prefix_index_dropped.labels(model=model).inc(dropped)
        if resyncs:
            metrics.prefix_index_resyncs.labels(model=model).inc(resyncs)
