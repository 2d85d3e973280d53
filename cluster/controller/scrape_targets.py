"""GetStatus -> where Prometheus finds every process of the cluster. Pure."""

from __future__ import annotations

import json
from typing import TypedDict

from cluster.domain.ids import ReplicaId
from cluster.v1 import control_pb2

PATH = "/targets"
METRICS = "metrics"  # the name of the port


class ScrapeTarget(TypedDict):
    """One group of Prometheus's HTTP service discovery."""

    targets: list[str]
    labels: dict[str, str]


def scrape_targets(status: control_pb2.ClusterStatus) -> list[ScrapeTarget]:
    """Every process with a metrics port, in a stable order.

    Labels say what it is: kind and node, for a rank also model, replica and rank. They have the same values as
    labels of these names in the process's own series.
    """
    found = [_target(process) for process in status.processes if process.ports.get(METRICS)]
    return sorted(found, key=lambda target: (target["labels"]["kind"], target["targets"]))


def scrape_targets_json(status: control_pb2.ClusterStatus) -> bytes:
    """As ``http_sd_configs`` of Prometheus reads it."""
    return json.dumps(scrape_targets(status), indent=1).encode()


def _target(process: control_pb2.ProcessStatus) -> ScrapeTarget:
    host = f"[{process.node}]" if ":" in process.node else process.node
    labels = {"kind": process.kind, "node": process.node}
    if process.HasField("rank"):
        replica = ReplicaId.parse(process.rank.replica)
        labels |= {"model": replica.model, "replica": str(replica), "rank": str(process.rank.rank)}
    return {"targets": [f"{host}:{process.ports[METRICS]}"], "labels": labels}
