"""A plan as values of the Helm chart: what its pods must ask for. Pure.

Memory of a pod, which is its request and its limit::

    devices x rank + Ray's object store + node + /dev/shm

``rank`` on a GPU is HOST_BYTES_PER_GPU_RANK (interpreter, CUDA's host side, staging buffers: the weights lie on the
device). On a CPU it is the ledger's peak divided by the share that is ours (device_memory_utilization), since the
controller plans again with what Ray finds in the pod: its limit less the object store, divided by its slots. ``node``
is the worker's own process and Ray's. /dev/shm counts, since the kernel charges its pages to the pod.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cluster.config.schema import ModelConfig
from cluster.domain.hardware import DeviceKind
from cluster.domain.quantities import GIB, MIB, format_bytes, format_seconds
from cluster.planner.plan import Plan

# Round figures, not measured ones, except where a source is named.
HOST_BYTES_PER_GPU_RANK = 8 * GIB
NODE_BYTES = 1 * GIB
OBJECT_STORE_BYTES = 100_000_000  # what our Ray nodes are started with
# NCCL's buffers for peers in the pod without a direct link; the CPU kernel's workspace is 66 MB for each rank.
SHM_BYTES_PER_DEVICE = {DeviceKind.CUDA: 1 * GIB, DeviceKind.CPU: 128 * MIB}
CPU_CORES_PER_DEVICE = {DeviceKind.CUDA: 2.0, DeviceKind.CPU: 1.0}
# The roofline is what one sequence alone reaches at best; a full batch on a real machine is slower.
PACE_MARGIN = 3.0
LEAST_SECONDS_PER_TOKEN = 0.005
# A hub's cache keeps one commit; the next one must fit beside it while it is fetched.
CACHE_ROOM = 2.2
WIDTH = 118
MOUNT_PATH = "/models"
TOKEN_SECRET = "llm-cluster-token"  # noqa: S105 - a name
# Labels of NVIDIA's GPU feature discovery.
GPU_PRODUCTS = {
    "a100-40": "NVIDIA-A100-SXM4-40GB",
    "a100": "NVIDIA-A100-SXM4-80GB",
    "h100": "NVIDIA-H100-80GB-HBM3",
    "h200": "NVIDIA-H200",
    "b200": "NVIDIA-B200",
    "l40s": "NVIDIA-L40S",
    "l4": "NVIDIA-L4",
    "a10g": "NVIDIA-A10G",
}
# Settings of a model that the plan decides; the others are printed only where they were given.
_DECIDED = ("replicas", "tensor_parallel_size", "pipeline_parallel_size", "dtype", "device", "max_model_len")
_BESIDE = (
    "max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "max_waiting_prompt_tokens", "prefill_slowdown",
    "enable_prefix_caching", "rope_scaling", "load_format", "seed", "block_size", "device_memory_utilization",
    "kv_cache_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """Where pods find the model: ``repo_id`` at ``commit`` on a hub, ``demo`` in the image, else a folder ``name``."""

    name: str
    repo_id: str = ""
    commit: str = ""
    demo: bool = False
    stored_bytes: int = 0  # of the whole checkpoint; 0: not known


def helm_values(plan: Plan, config: ModelConfig, source: Source) -> dict[str, Any]:
    """Values for ``helm/llm-cluster`` that serve what was planned; they render as they are.

    ``config`` is what was asked for. Nodes of the plan become pods of one worker group.
    """
    pods, devices = _pods(plan), _devices_per_pod(plan)
    values: dict[str, Any] = {
        "models": [_model(plan, config, source)],
        "workers": [
            {
                "name": _group_name(plan),
                "replicas": pods,
                "devicesPerPod": devices,
                "deviceKind": "cpu" if _kind(plan) is DeviceKind.CPU else "gpu",
                **({} if _kind(plan) is DeviceKind.CPU else {"gpuResource": "nvidia.com/gpu"}),
                "cpuPerDevice": CPU_CORES_PER_DEVICE[_kind(plan)],
                "memory": _gib(_memory_bytes(plan, config)),
                "shmSize": _gib(_shm_bytes(plan)),
                "modelBytes": _model_bytes(plan, source),
            }
        ],
        "drain": {"secondsPerToken": seconds_per_token(plan)},
        "auth": {"existingSecret": TOKEN_SECRET},
    }
    volume = _volume(plan, source)
    return values | ({"modelVolume": volume} if volume else {})


def seconds_per_token(plan: Plan) -> float:
    """The slowest pace that a drain waits for: PACE_MARGIN times the expected time, in three figures, upwards."""
    pace = max(LEAST_SECONDS_PER_TOKEN, PACE_MARGIN * plan.cost.tpot_s)
    unit = 10.0 ** (math.floor(math.log10(pace)) - 2)
    return min(10.0, round(math.ceil(round(pace / unit, 6)) * unit, 9))


def _kind(plan: Plan) -> DeviceKind:
    return plan.device.kind


def _ranks_by_node(plan: Plan) -> Counter[str]:
    return Counter(rank.node_id for placement in plan.placements for rank in placement.ranks)


def _pods(plan: Plan) -> int:
    return max(1, len(_ranks_by_node(plan)))


def _devices_per_pod(plan: Plan) -> int:
    """Of the fullest node: pods of a group are equal."""
    return max(_ranks_by_node(plan).values(), default=plan.layout.tensor_parallel_size)


def _group_name(plan: Plan) -> str:
    """The device's name, as a part of a pod's name."""
    return re.sub(r"[^a-z0-9-]", "-", plan.device.name.lower())[:20].strip("-")


def _memory_bytes(plan: Plan, config: ModelConfig) -> int:
    if _kind(plan) is DeviceKind.CPU:
        fullest = max(ledger.peak_bytes for ledger in plan.ledgers)
        rank = math.ceil(fullest / config.device_memory_utilization)
    else:
        rank = HOST_BYTES_PER_GPU_RANK
    shm = math.ceil(_shm_bytes(plan) / GIB) * GIB
    return _devices_per_pod(plan) * rank + OBJECT_STORE_BYTES + NODE_BYTES + shm


def _shm_bytes(plan: Plan) -> int:
    """Ray's object store and the ranks' buffers."""
    return OBJECT_STORE_BYTES + _devices_per_pod(plan) * SHM_BYTES_PER_DEVICE[_kind(plan)]


def _checkpoint_bytes(plan: Plan, source: Source) -> int:
    """Of all files; without them what the parameters take in the checkpoint's own type, some of them counted twice."""
    if source.stored_bytes:
        return source.stored_bytes
    return sum(ledger.parameters for ledger in plan.ledgers) * plan.spec.dtype.itemsize


def _model_bytes(plan: Plan, source: Source) -> int:
    """With a hub's cache the whole checkpoint is fetched to each node; otherwise each rank reads its shard."""
    if source.repo_id:
        return _checkpoint_bytes(plan, source)
    read = [ledger.read_bytes or ledger.parameters * plan.spec.dtype.itemsize for ledger in plan.ledgers]
    by_node: Counter[str] = Counter()
    for placement in plan.placements:
        for rank in placement.ranks:
            by_node[rank.node_id] += read[rank.rank]
    return max(by_node.values(), default=sum(read))


def _model(plan: Plan, config: ModelConfig, source: Source) -> dict[str, Any]:
    where = "demo" if source.demo else source.repo_id or f"{MOUNT_PATH}/{source.name}"
    served = config.served_model_name or re.sub(r"[\s#]", "-", source.name)
    decided: dict[str, Any] = {
        "model": where,
        "served_model_name": served,
        **({"revision": source.commit} if source.repo_id else {}),
        "replicas": len(plan.placements),
        "tensor_parallel_size": plan.layout.tensor_parallel_size,
        "pipeline_parallel_size": plan.layout.pipeline_parallel_size,
        "dtype": plan.dtype.value,
        "device": _kind(plan).value,
        "max_model_len": plan.max_model_len,
    }
    given = config.model_fields_set
    return decided | {name: getattr(config, name) for name in _BESIDE if name in given}


def _volume(plan: Plan, source: Source) -> dict[str, Any]:
    if source.demo:
        return {}
    if source.repo_id:
        size = _gib(int(CACHE_ROOM * _checkpoint_bytes(plan, source)))
        return {"type": "hubCache", "mountPath": MOUNT_PATH, "hubCache": {"size": size}}
    return {"type": "pvc", "mountPath": MOUNT_PATH, "pvc": {"claimName": "models"}}


def _gib(amount: int) -> str:
    return f"{math.ceil(amount / GIB)}Gi"


# ---- as YAML, with where each number comes from ----


def render_helm_values(plan: Plan, config: ModelConfig, source: Source) -> str:
    """``helm_values`` as commented YAML."""
    values = helm_values(plan, config, source)
    lines = [wrapped for line in _heading(plan, source) for wrapped in _wrapped(line, "")]
    comments = _comments(plan, config, source, values)
    for key, value in values.items():
        lines += ["", *_yaml(key, value, comments, key, "")]
    return "\n".join(lines) + "\n"


def _wrapped(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=start)


def _heading(plan: Plan, source: Source) -> list[str]:
    replicas = f"{len(plan.placements)} replica(s) on {_pods(plan)} pod(s) of {_devices_per_pod(plan)}"
    return [
        f"{source.name}: {plan.layout} in {plan.dtype}, {replicas} x {plan.device.name}; by llm-cluster plan.",
        "helm install NAME helm/llm-cluster --values FILE; before that see docs/kubernetes.md.",
    ]


def _comments(plan: Plan, config: ModelConfig, source: Source, values: dict[str, Any]) -> dict[str, str]:
    """By dotted path: what the number below comes from."""
    drain_s = plan.max_model_len * values["drain"]["secondsPerToken"]
    spare = _pods(plan) * _devices_per_pod(plan) - len(plan.placements) * plan.layout.world_size
    comments = {
        "models.model": "" if source.demo or source.repo_id else "Where the pods see the checkpoint; see modelVolume.",
        "models.tensor_parallel_size": f"{plan.reason}.",
        "models.max_model_len": f"{plan.kv_blocks} KV blocks hold {plan.max_concurrent_tokens} tokens at once.",
        "workers.replicas": "Nodes that the plan uses" + (f"; {spare} device(s) stay free." if spare else "."),
        "workers.cpuPerDevice": "A round figure.",
        "workers.memory": _memory_comment(plan, config),
        "workers.shmSize": f"Ray's object store + {format_bytes(SHM_BYTES_PER_DEVICE[_kind(plan)])} for each device.",
        "workers.modelBytes": (
            "The whole checkpoint, fetched once to each pod" if source.repo_id else "What the ranks of a pod read"
        )
        + "; sizes the startup probe with readBytesPerSecond.",
        "drain.secondsPerToken": f"{PACE_MARGIN:g} x the expected {format_seconds(plan.cost.tpot_s)}: the longest "
        f"generation ({plan.max_model_len} tokens) may take {format_seconds(drain_s)} when a pod ends. A smaller "
        "max_model_len, or config.router and config.controller.drain_deadline_s, make that shorter.",
        "auth": f"kubectl create secret generic {TOKEN_SECRET} --from-literal=token=$(openssl rand -hex 32)",
        "modelVolume": "Any of pvc, local, hubCache, hostPath: docs/kubernetes.md compares them.",
        "modelVolume.pvc.claimName": f"Your claim; it holds the folder {source.name}.",
        "modelVolume.hubCache.size": f"{CACHE_ROOM:g} x the checkpoint: the next commit is fetched beside this one.",
    }
    return {path: text for path, text in comments.items() if text}


def _memory_comment(plan: Plan, config: ModelConfig) -> str:
    devices = _devices_per_pod(plan)
    if _kind(plan) is DeviceKind.CPU:
        total = max(ledger.peak_bytes for ledger in plan.ledgers)
        rank = f"{format_bytes(total)} of a rank / {config.device_memory_utilization:g} of it ours"
    else:
        rank = f"{format_bytes(HOST_BYTES_PER_GPU_RANK)} of host memory for a rank"
    return f"{devices} x ({rank}) + Ray's object store + {format_bytes(NODE_BYTES)} for the node + shmSize."


def _yaml(key: str, value: Any, comments: dict[str, str], path: str, indent: str) -> list[str]:
    lines = _wrapped(comments.get(path, ""), indent)
    if isinstance(value, dict):
        lines.append(f"{indent}{key}:")
        for inner, item in value.items():
            lines += _yaml(inner, item, comments, f"{path}.{inner}", indent + "  ")
    elif isinstance(value, list):
        lines.append(f"{indent}{key}:")
        for item in value:
            inside = [line for k, v in item.items() for line in _yaml(k, v, comments, f"{path}.{k}", indent + "    ")]
            first = next(i for i, line in enumerate(inside) if not line.lstrip().startswith("#"))
            lines += [line[2:] for line in inside[:first]]
            lines += [f"{indent}  - {inside[first].lstrip()}", *inside[first + 1 :]]
    else:
        lines.append(f"{indent}{key}: {json.dumps(value)}")
    if path == "workers":
        lines += [f"{indent}    # {line}" for line in _placing_hint(value[0])]
    return lines


def _placing_hint(group: dict[str, Any]) -> list[str]:
    product = GPU_PRODUCTS.get(group["name"])
    if product is None:
        return []
    return [
        "Where nodes are labelled by GPU feature discovery:",
        f'nodeSelector: {{"nvidia.com/gpu.product": "{product}"}}',
        'tolerations: [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]',
    ]
