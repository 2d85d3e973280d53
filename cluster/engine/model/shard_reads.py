"""What to read for one rank's part of a parameter: where its slices lie in the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from cluster.checkpoint.splits import Pieces
from cluster.engine.model.conversion import Box, Source
from cluster.engine.model.sharding import Kept
from cluster.engine.model.shards import Shard
from cluster.engine.model.weights import ShardRead


def shard_reads(target: torch.Tensor, kept: Kept, sources: Sequence[Source]) -> list[ShardRead]:
    """Reads that fill ``target``, this rank's part of a parameter, from the ``sources`` of the whole parameter."""
    if len(sources) == 1 and _is_plain(sources[0]):
        return [ShardRead(target, sources[0].header, _plain_shard(kept))]
    return [read for source in sources for read in _reads(target, kept, source)]


def _is_plain(source: Source) -> bool:
    whole = tuple((0, size) for size in source.header.shape)
    return not source.transposed and len(whole) <= 2 and source.source_box == whole == source.target_box


def _plain_shard(kept: Kept) -> Shard:
    if kept.dim is None:
        return Shard()
    return Shard(rows=kept.pieces) if kept.dim == 0 else Shard(columns=kept.pieces)


def _reads(target: torch.Tensor, kept: Kept, source: Source) -> Iterator[ShardRead]:
    """One read for each kept piece that the source touches."""
    box = source.target_box
    if kept.dim is None:
        yield _read(target, source, box, box)
        return
    before = 0
    for start, stop in kept.pieces:
        first, last = max(start, box[kept.dim][0]), min(stop, box[kept.dim][1])
        if first < last:
            local = (before + first - start, before + last - start)
            yield _read(target, source, _replaced(box, kept.dim, (first, last)), _replaced(box, kept.dim, local))
        before += stop - start


def _replaced(box: Box, dim: int, side: tuple[int, int]) -> Box:
    return (*box[:dim], side, *box[dim + 1 :])


def _read(target: torch.Tensor, source: Source, part: Box, place: Box) -> ShardRead:
    """``part``: of the whole parameter, inside of the source's target box; ``place``: where it goes in ``target``."""
    view = target[tuple(slice(*side) for side in place)]
    lacking = len(part) - len(source.source_box)
    assert lacking >= 0, source
    # Dimensions that the source lacks are one wide; those are left out from the front.
    wide = [
        dim for dim in range(len(part)) if part[dim][1] - part[dim][0] != 1 or len(part) - dim <= len(source.source_box)
    ]
    dims = wide[len(wide) - len(source.source_box) :]
    for dim in reversed([dim for dim in range(len(part)) if dim not in dims]):
        view = view.select(dim, 0)
    if source.transposed:
        dims[-2:] = dims[:-3:-1]
        view = view.transpose(-1, -2)
    offsets = [part[dim][0] - source.target_box[dim][0] for dim in dims]
    lengths = [part[dim][1] - part[dim][0] for dim in dims]
    sides = tuple(
        (side[0] + offset, side[0] + offset + length)
        for side, offset, length in zip(source.source_box, offsets, lengths, strict=True)
    )
    return ShardRead(view, source.header, _shard(source.header.shape, sides))


def _shard(shape: tuple[int, ...], box: Box) -> Shard:
    """``box`` of a tensor of ``shape`` as rows and columns of its matrix form."""
    if len(shape) == 1:
        return Shard(rows=(box[0],))
    *outer, last = box
    return Shard(_rows(shape[:-1], outer), None if last == (0, shape[-1]) else (last,))


def _rows(shape: tuple[int, ...], box: Sequence[tuple[int, int]]) -> Pieces:
    start, stop = box[-1]
    if (start, stop) == (0, shape[-1]) and len(box) > 1:
        return tuple((a * shape[-1], b * shape[-1]) for a, b in _rows(shape[:-1], box[:-1]))
    found = []
    for indices in product(*(range(*side) for side in box[:-1])):
        row = 0
        for index, size in zip(indices, shape, strict=False):
            row = row * size + index
        found.append((row * shape[-1] + start, row * shape[-1] + stop))
    return tuple(found)
