"""Reads put together a rank's part of a parameter, whatever tensors the checkpoint keeps it in."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.headers import TensorHeader
from cluster.checkpoint.splits import GrainCut, HeadCut, HeadOrder
from cluster.engine.model.conversion import Source
from cluster.engine.model.shard_reads import shard_reads
from cluster.engine.model.sharding import ALL, Kept
from cluster.engine.model.weights import ShardRead


def _header(name: str, tensor: torch.Tensor) -> TensorHeader:
    size = tensor.numel() * 4
    return TensorHeader(name=name, dtype="F32", shape=tuple(tensor.shape), file=Path("x"), offset=0, nbytes=size)


def _fill(reads: list[ShardRead], stored: dict[str, torch.Tensor]) -> None:
    """What ``weights.load`` does, on tensors in memory."""
    for read in reads:
        matrix = stored[read.header.name]
        matrix = matrix.reshape(-1, 1) if matrix.dim() == 1 else matrix.reshape(-1, matrix.shape[-1])
        if read.shard.rows is not None:
            matrix = torch.cat([matrix[start:stop] for start, stop in read.shard.rows])
        if read.shard.columns is not None:
            matrix = torch.cat([matrix[:, start:stop] for start, stop in read.shard.columns], dim=1)
        read.target.copy_(matrix.reshape(read.target.shape))


def _expected(whole: torch.Tensor, kept: Kept) -> torch.Tensor:
    if kept.dim is None:
        return whole
    return torch.cat([whole.narrow(kept.dim, start, stop - start) for start, stop in kept.pieces], dim=kept.dim)


def _check(whole: torch.Tensor, kept: Kept, sources: list[Source], stored: dict[str, torch.Tensor]) -> None:
    expected = _expected(whole, kept)
    target = torch.full_like(expected, float("nan"))
    _fill(shard_reads(target, kept, sources), stored)
    assert torch.equal(target, expected)


def _box(tensor: torch.Tensor) -> tuple[tuple[int, int], ...]:
    return tuple((0, size) for size in tensor.shape)


@given(ranks=st.integers(1, 4), dim=st.integers(0, 1), order=st.sampled_from(HeadOrder))
def test_one_tensor_in_one_read(ranks: int, dim: int, order: HeadOrder) -> None:
    units = {HeadOrder.QUERY: 4, HeadOrder.KV: 2}.get(order, 8)
    whole = torch.randn((units * 3, 5) if dim == 0 else (5, units * 3))
    source = Source(_header("w", whole), _box(whole), _box(whole))
    for pieces in HeadCut(dim, 4, 2, order, 3).pieces(ranks):
        kept = Kept(dim, pieces)
        assert len(shard_reads(_expected(whole, kept).clone(), kept, [source])) == 1
        _check(whole, kept, [source], {"w": whole})


def test_a_vector_and_a_whole_tensor() -> None:
    vector, matrix = torch.randn(12), torch.randn(3, 4, 5)
    _check(
        vector, Kept(0, ((2, 4), (7, 12))), [Source(_header("b", vector), _box(vector), _box(vector))], {"b": vector}
    )
    _check(matrix, ALL, [Source(_header("m", matrix), _box(matrix), _box(matrix))], {"m": matrix})


@given(ranks=st.integers(1, 3), transposed=st.booleans())
def test_experts_of_many_tensors(ranks: int, transposed: bool) -> None:
    experts, size, hidden = 3, 6, 5
    whole = torch.randn(experts, 2 * size, hidden)
    stored, sources = {}, []
    for expert in range(experts):
        for part, name in enumerate(("gate", "up")):
            rows = (part * size, (part + 1) * size)
            block = whole[expert, rows[0] : rows[1]]
            stored[f"{expert}.{name}"] = block.t().contiguous() if transposed else block
            header = _header(f"{expert}.{name}", stored[f"{expert}.{name}"])
            box = ((expert, expert + 1), rows, (0, hidden))
            sources.append(Source(header, _box(stored[f"{expert}.{name}"]), box, transposed))
    for pieces in GrainCut(1, size, parts=2).pieces(ranks):
        _check(whole, Kept(1, pieces), sources, stored)
    _check(whole, ALL, sources, stored)


@given(ranks=st.integers(1, 3), dim=st.integers(1, 2))
def test_experts_of_one_tensor(ranks: int, dim: int) -> None:
    whole = torch.randn(3, 8, 8)
    source = Source(_header("e", whole), _box(whole), _box(whole))
    for pieces in GrainCut(dim, 4, unit=2).pieces(ranks):
        _check(whole, Kept(dim, pieces), [source], {"e": whole})


def test_a_part_of_a_tensor() -> None:
    stored = torch.randn(10, 4)
    whole = stored[2:8]
    source = Source(_header("s", stored), ((2, 8), (0, 4)), ((0, 6), (0, 4)))
    _check(whole, Kept(0, ((1, 3), (5, 6))), [source], {"s": stored})
    _check(whole, Kept(1, ((1, 4),)), [source], {"s": stored})
