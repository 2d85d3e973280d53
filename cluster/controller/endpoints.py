"""Observed -> the table that routers get. Pure, with an epoch that only grows."""

from __future__ import annotations

from dataclasses import replace

from cluster.controller.desired import Desired
from cluster.controller.observed import Observed, ReplicaView
from cluster.domain.endpoint import Endpoint, EndpointTable
from cluster.domain.replica import ReplicaPhase

_SERVING = (ReplicaPhase.READY, ReplicaPhase.DRAINING)
EPOCHS_PER_LIFE = 1 << 32


def first_epoch(controller_life: int) -> int:
    """Below every epoch of this life of the controller, above every one of its earlier lives."""
    return controller_life * EPOCHS_PER_LIFE


def endpoint_table(desired: Desired, observed: Observed, epoch: int) -> EndpointTable:
    """Replicas that are ready or drain, in a stable order, and the names of all desired models."""
    serving = (view for view in observed.replicas if view.phase in _SERVING and view.leader is not None)
    endpoints = sorted((_endpoint(view) for view in serving), key=lambda e: e.incarnation)
    return EndpointTable(epoch, tuple(endpoints), tuple(sorted(model.name for model in desired)))


def next_table(last: EndpointTable, desired: Desired, observed: Observed) -> EndpointTable:
    """``last`` itself while nothing changed, else the new one under the next epoch."""
    table = replace(endpoint_table(desired, observed, last.epoch), state_id=last.state_id)
    return last if table == last else replace(table, epoch=last.epoch + 1)


def _endpoint(view: ReplicaView) -> Endpoint:
    assert view.leader is not None, view
    report = view.leader.report
    return Endpoint(
        incarnation=view.incarnation,
        address=view.engine_address,
        checkpoint_digest=report.checkpoint_digest,
        block_size=report.block_size,
        draining=view.phase is ReplicaPhase.DRAINING,
    )
