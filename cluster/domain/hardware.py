"""What there is to run on: devices, nodes, an inventory of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cluster.domain.errors import ConfigError
from cluster.domain.quantities import GB


class DeviceKind(enum.StrEnum):
    """A CPU slot is a device like any other."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class DeviceType:
    """One accelerator as its maker publishes it.

    ``memory_bytes`` is the advertised capacity in decimal bytes (an "80 GB" card counts 80e9: what the
    driver keeps for itself stays outside). ``memory_bytes_per_s``: device memory bandwidth;
    ``flops``: dense bf16 operations per second; ``link_bytes_per_s``: one direction to a peer in the node.
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    memory_bytes_per_s: float
    flops: float
    link_bytes_per_s: float


# From the makers' data sheets (SXM variants where there are several; dense bf16 rates).
DEVICE_TYPES = {
    t.name: t
    for t in (
        DeviceType("a100-40", DeviceKind.CUDA, 40 * GB, 1.555e12, 312e12, 300e9),
        DeviceType("a100", DeviceKind.CUDA, 80 * GB, 2.039e12, 312e12, 300e9),
        DeviceType("h100", DeviceKind.CUDA, 80 * GB, 3.35e12, 989e12, 450e9),
        DeviceType("h200", DeviceKind.CUDA, 141 * GB, 4.8e12, 989e12, 450e9),
        DeviceType("b200", DeviceKind.CUDA, 180 * GB, 7.7e12, 2250e12, 900e9),
        DeviceType("l40s", DeviceKind.CUDA, 48 * GB, 0.864e12, 362e12, 32e9),
        DeviceType("l4", DeviceKind.CUDA, 24 * GB, 0.3e12, 121e12, 32e9),
        DeviceType("a10g", DeviceKind.CUDA, 24 * GB, 0.6e12, 70e12, 32e9),
    )
}


def cpu_device(memory_bytes: int) -> DeviceType:
    """A CPU slot with its share of the node's memory; the rates are those of two cores of a server part."""
    return DeviceType("cpu", DeviceKind.CPU, memory_bytes, 20e9, 190e9, 10e9)


def device_type(name: str) -> DeviceType:
    """The published device called ``name``; ConfigError names those that are known."""
    try:
        return DEVICE_TYPES[name.lower()]
    except KeyError:
        known = ", ".join(DEVICE_TYPES)
        msg = f"No device type is called {name!r}; known are {known} and cpu."
        raise ConfigError(msg) from None


@dataclass(frozen=True, slots=True)
class Node:
    """One machine: ``free_devices`` of its ``devices`` can be taken now."""

    node_id: str
    host: str
    device: DeviceType
    devices: int
    free_devices: int
    cpu_cores: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.free_devices <= self.devices, (self.free_devices, self.devices)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The nodes of a pool. ``inter_node_bytes_per_s``: one direction of the network between two nodes."""

    nodes: tuple[Node, ...]
    inter_node_bytes_per_s: float = 25e9

    @property
    def free_devices(self) -> int:
        return sum(node.free_devices for node in self.nodes)


def uniform_inventory(nodes: int, devices_per_node: int, device: DeviceType) -> Inventory:
    """``nodes`` equal, empty machines: what ``plan --nodes N --devices-per-node M`` asks about."""
    return Inventory(
        tuple(
            Node(f"node-{i}", f"node-{i}", device, devices_per_node, devices_per_node, devices_per_node)
            for i in range(nodes)
        )
    )
