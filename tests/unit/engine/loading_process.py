"""A rank as far as loading goes: ``python loading_process.py FOLDER RANK RANKS DTYPE`` loads its shard and tells bytes.

With "pack" behind it, it makes a model of Linears of them and reorders their weights, as for a CPU's products.
Tensors whose name ends in "row" are cut by columns, others by rows. Each target is compared with one of its elements.
"""

import json
import sys
from pathlib import Path

import torch

from cluster.checkpoint.layout import read_checkpoint
from cluster.engine.host_memory import AnonymousPeak, prefer_huge_pages
from cluster.engine.model import weights
from cluster.engine.model.shards import Shard


def packed(reads):
    """How many Linears with the ``reads`` as weights were replaced; nothing else keeps the weights alive."""
    from torch import nn

    from cluster.engine.model import cpu
    from cluster.engine.model.tensor_parallel import TensorParallelGroup

    model = nn.ModuleList()
    while reads:
        weight = reads.pop().target
        linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        model.append(linear)
    del weight
    return cpu.prepare(model, TensorParallelGroup(0, 1, "gloo")).products


def main(folder, rank, ranks, dtype, pack):
    prefer_huge_pages()  # as a rank does: the bound holds with them
    checkpoint = read_checkpoint(Path(folder))
    reads = []
    torch.ones(8, 8) @ torch.ones(8, 8)  # what the first product takes is no matter of loading
    if pack:
        packed([weights.ShardRead(torch.ones(64, 64), None, None)])  # nor are the imports
    with AnonymousPeak() as peak:
        for name, header in checkpoint.tensors.items():
            rows, columns = header.shape
            if name.endswith("row"):
                shape, shard = (
                    (rows, columns // ranks),
                    Shard(columns=((columns * rank // ranks, columns * (rank + 1) // ranks),)),
                )
            else:
                shape, shard = (
                    (rows // ranks, columns),
                    Shard(rows=((rows * rank // ranks, rows * (rank + 1) // ranks),)),
                )
            reads.append(weights.ShardRead(torch.empty(shape, dtype=getattr(torch, dtype)), header, shard))
        weights.load(reads, lambda count: None, rank=rank, ranks=ranks)
        assert all(float(read.target[-1, -1]) == float(read.header.name.split(".")[0]) for read in reads)
        slices = [read.target.nbytes for read in reads]
        count = packed(reads) if pack else 0
    print(
        json.dumps(
            {"shard": sum(slices), "slice": max(slices), "peak": peak.bytes, "packed": count, "baseline": "RssAnon"}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], "pack" in sys.argv[5:])
