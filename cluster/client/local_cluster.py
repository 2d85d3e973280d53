"""The cluster that was started on this machine, as its run directory remembers it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.domain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """What this machine started, and how to find it again.

    ``router_started_s``: as ``process_identity`` has it. ``router_drain_s``: what the router gives its streams once it
    is told to end. ``owns_ray``: Ray is ours to stop; then ``rank_ports`` (first and last) say whose segments are ours.
    ``stopping``: somebody is ending it, so nothing that dies is started again.
    """

    cluster_name: str
    rank_ports: tuple[int, int]
    control_address: str
    router_address: str
    router_pid: int
    router_started_s: float
    ray_address: str
    owns_ray: bool
    router_drain_s: float = 30.0
    stopping: bool = False


def load_local(run_dir: Path) -> LocalCluster | None:
    """The cluster that was started under ``run_dir`` and not stopped."""
    try:
        return LocalCluster(**json.loads(record_file(run_dir).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{record_file(run_dir)} is damaged; end the processes by hand and delete {run_dir}."
        ) from error


def control_address_of(run_dir: Path) -> str:
    """Where the controller of the local cluster listens; ConfigError when there is none."""
    found = load_local(run_dir)
    if found is None:
        raise ConfigError(
            f"No cluster runs under {run_dir}; start one with 'llm-cluster serve', or name it with --run-dir "
            "or --controller."
        )
    return found.control_address


def record_file(run_dir: Path) -> Path:
    return run_dir / "cluster.json"


def remember(run_dir: Path, cluster: LocalCluster) -> None:
    temporary = record_file(run_dir).with_suffix(".new")
    temporary.write_text(json.dumps(asdict(cluster), indent=2), encoding="utf-8")
    temporary.replace(record_file(run_dir))


def forget(run_dir: Path) -> None:
    """The cluster is gone."""
    record_file(run_dir).unlink(missing_ok=True)
