"""Who is there besides controller and ranks: routers and workers count as processes while their stream is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.controller.cluster_status import ProcessFacts
from cluster.domain.errors import ReplicaError

MOST = 10_000


class Attendance:
    """Belongs to the controller's event loop."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._present: dict[object, ProcessFacts] = {}

    @contextmanager
    def present(self, process: ProcessFacts) -> Iterator[None]:
        """While the block runs; ReplicaError when too many are there."""
        if len(self._present) >= self._most:
            raise ReplicaError(f"{self._most} routers and workers are connected already; stop some.")
        key = object()
        self._present[key] = process
        try:
            yield
        finally:
            del self._present[key]

    @property
    def processes(self) -> tuple[ProcessFacts, ...]:
        """In the order in which they came."""
        return tuple(self._present.values())
