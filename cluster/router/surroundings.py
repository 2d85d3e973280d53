"""What every request of a router shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config.schema import RouterConfig
from cluster.domain.clock import Clock
from cluster.router.admission_desk import AdmissionDesk
from cluster.router.fleet import Fleet
from cluster.telemetry.metrics import RouterMetrics


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every request of a router shares. ``desk`` follows from the others."""

    fleet: Fleet
    config: RouterConfig
    metrics: RouterMetrics
    clock: Clock
    desk: AdmissionDesk = field(init=False)

    def __post_init__(self) -> None:
        desk = AdmissionDesk(self.fleet, self.config, self.metrics, self.clock)
        object.__setattr__(self, "desk", desk)
