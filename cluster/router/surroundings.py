"""What every request of a router shares, and how one is ended from outside."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cluster.config.schema import RouterConfig
from cluster.domain.clock import Clock
from cluster.router.fleet import Fleet
from cluster.telemetry.metrics import RouterMetrics


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every request of a router shares."""

    fleet: Fleet
    config: RouterConfig
    metrics: RouterMetrics
    clock: Clock


class Interruption:
    """Why a request has to end, once somebody says so; the first reason counts."""

    __slots__ = ("_event", "error")

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._event = asyncio.Event()

    def trip(self, error: Exception) -> bool:
        """False when there was a reason already."""
        if self.error is not None:
            return False
        self.error = error
        self._event.set()
        return True

    def check(self) -> None:
        """Raises the reason, if there is one."""
        if self.error is not None:
            raise self.error

    async def wait(self) -> None:
        await self._event.wait()
