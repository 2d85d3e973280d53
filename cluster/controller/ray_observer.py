"""Ray's nodes as an inventory of devices. Every Ray call of the controller is counted here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
import ray._private.state

from cluster.domain.errors import ConfigError
from cluster.domain.hardware import DEVICE_TYPES, DeviceKind, DeviceType, Inventory, Node, cpu_device

# Ray's names where they are not ours in lower case.
_GPU_NAMES = {"a100-40g": "a100-40", "a100-80g": "a100"}
_ACCELERATOR_LABEL = "ray.io/accelerator-type"
_ACCELERATOR_RESOURCE = "accelerator_type:"


class RayCalls:
    """How often Ray was asked for anything, by call: fault-free steady state asks for nothing."""

    def __init__(self, on_call: Callable[[str], None] = lambda _: None) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._on_call = on_call

    def count(self, call: str) -> None:
        with self._lock:
            self._counts[call] = self._counts.get(call, 0) + 1
        self._on_call(call)

    @property
    def total(self) -> int:
        with self._lock:
            return sum(self._counts.values())


class RayObserver:
    """What Ray knows of nodes. Blocking: call it from a thread."""

    def __init__(self, calls: RayCalls) -> None:
        self._calls = calls

    def live_nodes(self) -> tuple[tuple[str, str], ...]:
        """(node id, address) of every living node."""
        self._calls.count("nodes")
        return tuple((n["NodeID"], n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"])

    def inventory(self, kind: DeviceKind) -> Inventory:
        """Nodes with devices of ``kind``; ConfigError for an accelerator whose memory is not known."""
        self._calls.count("nodes")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._calls.count("available_resources")
        available = ray._private.state.available_resources_per_node()  # noqa: SLF001 - public only for the whole cluster
        found = (node_of(node, available.get(node["NodeID"], {}), kind) for node in nodes)
        return Inventory(tuple(node for node in found if node is not None))

    def devices_for(self, wanted: str) -> Inventory:
        """What a model may be planned on that wants ``wanted`` (auto, cpu or cuda), in use or not.

        A node with GPUs appears with them, and with its CPU slots. GPUs whose memory is not known count for nothing
        while others do; ConfigError when there are no others and they are asked for.
        """
        self._calls.count("nodes")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        return Inventory(plannable(nodes, wanted))


def plannable(nodes: Iterable[Mapping[str, Any]], wanted: str) -> tuple[Node, ...]:
    """Of ``ray.nodes()``; see ``RayObserver.devices_for``."""
    found: list[Node] = []
    unknown: ConfigError | None = None
    for node in nodes:
        slots = node_of(node, node["Resources"], DeviceKind.CPU)
        if slots is not None:
            found.append(slots)
        if wanted == "cpu":
            continue
        try:
            gpus = node_of(node, node["Resources"], DeviceKind.CUDA)
        except ConfigError as error:
            unknown = error
            continue
        if gpus is not None:
            found.append(gpus)
    if unknown is not None and not any(node.device.kind is DeviceKind.CUDA for node in found):
        raise unknown
    return tuple(node for kind in DeviceKind for node in found if node.device.kind is kind)


def node_of(node: Mapping[str, Any], available: Mapping[str, float], kind: DeviceKind) -> Node | None:
    """One of ``ray.nodes()`` as ours; None when it has no device of ``kind``."""
    resources: Mapping[str, float] = node["Resources"]
    resource = "GPU" if kind is DeviceKind.CUDA else "CPU"
    devices = int(resources.get(resource, 0))
    if devices < 1:
        return None
    memory_bytes = int(resources.get("memory", 0))
    device = gpu_type(node) if kind is DeviceKind.CUDA else cpu_device(memory_bytes // devices)
    return Node(
        node_id=node["NodeID"],
        host=node["NodeManagerAddress"],
        device=device,
        devices=devices,
        free_devices=min(devices, int(available.get(resource, 0))),
        cpu_cores=max(1, int(resources.get("CPU", 1))),
    )


def gpu_type(node: Mapping[str, Any]) -> DeviceType:
    """The published device behind Ray's accelerator label or resource."""
    name = node.get("Labels", {}).get(_ACCELERATOR_LABEL, "")
    for resource in node["Resources"]:
        if not name and resource.startswith(_ACCELERATOR_RESOURCE):
            name = resource.removeprefix(_ACCELERATOR_RESOURCE)
    ours = _GPU_NAMES.get(name.lower(), name.lower())
    if ours not in DEVICE_TYPES:
        raise ConfigError(
            f"Node {node['NodeManagerAddress']} has an accelerator of type {name or 'unknown'!r} whose memory is not "
            f"known here; start its Ray node with --labels {_ACCELERATOR_LABEL}=NAME, NAME one of "
            f"{', '.join(DEVICE_TYPES)}, or choose device cpu."
        )
    return DEVICE_TYPES[ours]
