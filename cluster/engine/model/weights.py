"""From safetensors to this rank's shard: every rank reads its slices and nothing else.

Files are read with ``pread`` through one staging buffer, not mapped: the peak above the shard itself is the buffer,
and no page of a mapping counts against the process. Rows of a column-parallel weight are contiguous; for a
row-parallel one whole rows are read and a strip of each is kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.checkpoint.headers import TensorHeader
from cluster.domain.errors import CheckpointError
from cluster.engine.model.tensor_parallel import Shard

STAGING_BYTES = 16 * 2**20
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ShardRead:
    """One parameter to fill: ``target`` (this rank's part, on its device) from ``shard`` of ``header``."""

    target: torch.Tensor
    header: TensorHeader
    shard: Shard


def bytes_to_read(reads: list[ShardRead]) -> int:
    """Bytes of the shard in the files' own element type: what ``progress`` adds up to."""
    return sum(_shard_elements(read) * _dtype(read.header).itemsize for read in reads)


def load(reads: list[ShardRead], progress: Progress) -> None:
    """Fills every target, file by file in the order of the bytes, converting element types on the way.

    ``progress`` is called with the number of bytes just delivered. CheckpointError when a file ends early or a
    tensor's element type is not a floating-point one that we know.
    """
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
    with ExitStack() as stack:
        descriptors: dict[Path, int] = {}
        for read in sorted(reads, key=lambda r: (r.header.file, r.header.offset)):
            file = read.header.file
            if file not in descriptors:
                descriptors[file] = os.open(file, os.O_RDONLY)
                stack.callback(os.close, descriptors[file])
            _fill(read, descriptors[file], staging, progress)


def _fill(read: ShardRead, descriptor: int, staging: torch.Tensor, progress: Progress) -> None:
    header, shard = read.header, read.shard
    dtype = _dtype(header)
    rows, columns = _as_matrix(header.shape)
    target = read.target.reshape(-1, read.target.shape[-1]) if len(header.shape) > 1 else read.target.reshape(-1, 1)
    assert target.data_ptr() == read.target.data_ptr(), f"{header.name}: the target must be contiguous"
    row_ranges = shard.pieces if shard.dim == 0 else ((0, rows),)
    column_ranges = shard.pieces if shard.dim == 1 else ((0, columns),)
    rows_at_once = max(1, STAGING_BYTES // (columns * dtype.itemsize))
    filled = 0
    for start, stop in row_ranges:
        for first in range(start, stop, rows_at_once):
            count = min(rows_at_once, stop - first)
            buffer = _buffer(staging, count * columns * dtype.itemsize)
            _read_exactly(descriptor, buffer, header, header.offset + first * columns * dtype.itemsize)
            block = buffer.view(dtype).view(count, columns)
            _keep(block, column_ranges, target[filled : filled + count])
            filled += count
            progress(count * sum(b - a for a, b in column_ranges) * dtype.itemsize)


def _keep(block: torch.Tensor, column_ranges: tuple[tuple[int, int], ...], target: torch.Tensor) -> None:
    """Copies the columns of ``block`` side by side into ``target``."""
    offset = 0
    for start, stop in column_ranges:
        target[:, offset : offset + stop - start].copy_(block[:, start:stop])
        offset += stop - start


def _buffer(staging: torch.Tensor, size: int) -> torch.Tensor:
    # A single row may be longer than the staging buffer; then this row alone gets its own.
    return staging[:size] if size <= staging.numel() else torch.empty(size, dtype=torch.uint8)


def _read_exactly(descriptor: int, buffer: torch.Tensor, header: TensorHeader, offset: int) -> None:
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer protocol
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise CheckpointError(
                f"{header.file} ends in the middle of {header.name}; copy or download the file again."
            )
        view, offset = view[count:], offset + count


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """``shape`` as (rows, columns): a vector is a column."""
    if len(shape) <= 1:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def _shard_elements(read: ShardRead) -> int:
    total = math.prod(read.header.shape)
    if read.shard.dim is None:
        return total
    kept = sum(stop - start for start, stop in read.shard.pieces)
    return total // read.header.shape[read.shard.dim] * kept


def _dtype(header: TensorHeader) -> torch.dtype:
    try:
        return TORCH_DTYPES[header.dtype]
    except KeyError:
        known = ", ".join(TORCH_DTYPES)
        raise CheckpointError(
            f"{header.name} in {header.file} has the element type {header.dtype}; served are {known}."
        ) from None


def require(tensors: Mapping[str, TensorHeader], name: str, alias: str | None = None) -> TensorHeader:
    """The header of ``name``, or of ``alias`` for a tied weight that the checkpoint stores under another name."""
    header = tensors.get(name) or (tensors.get(alias) if alias else None)
    if header is None:
        raise CheckpointError(f"The checkpoint lacks the tensor {name}; export the model again, completely.")
    return header
