"""A rank process of the loading bench: gets ready, loads when it is told to, writes what it saw.

``python rank.py '{"folder": ..., "rank": 0, "ranks": 1, "dtype": "bfloat16", "whole": false, "port": 0}'``, then one
line on its standard input. ``whole``: all that a rank does up to its KV cache (``ShardedCausalLM.load``: reading,
packing, trying out) instead of ``weights.load`` alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.engine import host_memory, shm_kernel

host_memory.prefer_huge_pages()  # as a rank does, before torch is imported

import torch  # noqa: E402

from cluster.checkpoint.layout import Checkpoint, read_checkpoint  # noqa: E402
from cluster.domain.parallel_layout import Stage, StageLayers  # noqa: E402
from cluster.engine.model import weights  # noqa: E402
from cluster.engine.model.causal_lm import ShardedCausalLM  # noqa: E402
from cluster.engine.model.shards import WHOLE, Shard  # noqa: E402
from cluster.engine.model.tensor_parallel import TensorParallelGroup  # noqa: E402

RENDEZVOUS_S = 120


@dataclass(frozen=True)
class Order:
    """What this process is asked to do; the names are those of the JSON object."""

    folder: str
    rank: int
    ranks: int
    dtype: str
    whole: bool
    port: int


def shard_of(name: str, shape: tuple[int, ...], rank: int, ranks: int) -> Shard:
    """Llama's layers cut as they are served; norms and the embedding whole."""

    def mine(size: int) -> tuple[tuple[int, int], ...]:
        return ((size * rank // ranks, size * (rank + 1) // ranks),)

    if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")):
        return Shard(rows=mine(shape[0]))
    if "o_proj" in name or "down_proj" in name:
        return Shard(columns=mine(shape[1]))
    return WHOLE


def weights_alone(order: Order, checkpoint: Checkpoint) -> tuple[Callable[[], None], list[int]]:
    """What to call, and the bytes of every slice."""
    planned = []
    for header in checkpoint.tensors.values():
        shard = shard_of(header.name, header.shape, order.rank, order.ranks)
        shape = [
            header.shape[d] if ends is None else sum(b - a for a, b in ends)
            for d, ends in zip(range(len(header.shape)), (shard.rows, shard.columns), strict=False)
        ]
        planned.append((header, shard, shape))
    dtype = getattr(torch, order.dtype)
    kept: list[weights.ShardRead] = []

    def load() -> None:
        kept.extend(weights.ShardRead(torch.empty(shape, dtype=dtype), h, s) for h, s, shape in planned)
        weights.load(kept, lambda _: None, rank=order.rank, ranks=order.ranks)

    return load, [math.prod(shape) * dtype.itemsize for _, _, shape in planned]


def whole_rank(order: Order, checkpoint: Checkpoint) -> tuple[Callable[[], None], list[int]]:
    """The same for a rank as it is served."""
    collective = "shm" if shm_kernel.is_built() else "gloo"
    group = TensorParallelGroup(order.rank, order.ranks, collective)  # type: ignore[arg-type]
    group.join("127.0.0.1", order.port, RENDEZVOUS_S)
    stage = Stage(0, 1, StageLayers(0, checkpoint.config["num_hidden_layers"]))
    dtype, device = getattr(torch, order.dtype), torch.device("cpu")
    model = ShardedCausalLM(checkpoint, dtype, device, group, stage)
    slices = [p.numel() * dtype.itemsize for p in _parameters(model)]
    assert sum(slices) == model.parameter_bytes
    return lambda: model.load(lambda _: None, lambda _: None), slices


def _parameters(model: ShardedCausalLM) -> Iterable[torch.Tensor]:
    found: Iterable[torch.Tensor] = model._model.parameters()  # noqa: SLF001 - nobody else asks
    return found


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    checkpoint = read_checkpoint(Path(order.folder))
    load, slices = (whole_rank if order.whole else weights_alone)(order, checkpoint)
    torch.ones(8, 8) @ torch.ones(8, 8)  # the library's own memory
    print("ready", flush=True)
    sys.stdin.readline()
    began, cpu = time.monotonic(), os.times()
    with host_memory.AnonymousPeak() as peak:
        load()
        ended = time.monotonic()
    used = os.times()
    seen = {
        "began": began,
        "ended": ended,
        "cpu_s": used.user + used.system - cpu.user - cpu.system,
        "shard_bytes": sum(slices),
        "largest_slice_bytes": max(slices),
        "peak_anonymous_bytes": peak.bytes,
        "huge_page_bytes": host_memory.huge_page_bytes(),
    }
    print(json.dumps(seen), flush=True)
    os._exit(0)  # a group that was joined is left without a word


if __name__ == "__main__":
    main()
