"""Safetensors headers, read by hand: names, types, shapes and places of tensors, without a byte of weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.checkpoint.manifest import FileDigests
from cluster.domain.errors import CheckpointError

# The format's own bound on the header's JSON.
MAX_HEADER_BYTES = 100_000_000
# How Git LFS begins what it leaves in a file's place: "version https://git-lfs...".
_POINTER = b"version "
_LENGTH_BYTES = 8
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one tensor lies: ``nbytes`` bytes at byte ``offset`` of ``file``, row-major, little-endian.

    ``digests``: of that file, when a manifest gives them. ``dummy_key``: the tensor is in no file, its values are made
    from this number (``checkpoint.dummy``).
    """

    name: str
    dtype: str  # as safetensors writes it: F32, BF16, F16, ...
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    digests: FileDigests | None = field(default=None, compare=False, repr=False)
    dummy_key: int | None = None


@dataclass(frozen=True, slots=True)
class FileHeader:
    """One safetensors file: its tensors, its header's bytes as stored, its size."""

    file: Path
    tensors: tuple[TensorHeader, ...]
    raw: bytes
    size: int


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {what}; download or copy this file again.")


def read_header(file: Path) -> FileHeader:
    """The header of ``file``; CheckpointError when the file is truncated, overlong or contradicts itself."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            return parse_header(file, size, stream.read)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); check its permissions.") from None


def parse_header(file: Path, size: int, read: Callable[[int], bytes]) -> FileHeader:
    """The header of ``file``, which has ``size`` bytes; ``read`` gives its next bytes, from the first on."""
    head = read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        raise _damaged(file, f"it has {size} bytes, too few for a safetensors header")
    if head == _POINTER:
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; say 'git lfs pull' where it was cloned.")
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER_BYTES:
        raise _damaged(file, f"its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    if _LENGTH_BYTES + length > size:
        raise _damaged(file, f"it ends at byte {size}, inside its header of {length} bytes (truncated)")
    raw = read(length)
    entries = _parse(file, raw)
    start = _LENGTH_BYTES + length
    tensors = tuple(_tensor(file, name, entry, start) for name, entry in entries.items() if name != "__metadata__")
    _check_cover(file, tensors, start, size)
    return FileHeader(file, tensors, raw, size)


def _parse(file: Path, raw: bytes) -> dict[str, object]:
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError):
        raise _damaged(file, "its header is not JSON") from None
    if not isinstance(entries, dict):
        raise _damaged(file, "its header is not a JSON object")
    return entries


def _natural_numbers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value):
        return tuple(value)
    return None


def _tensor(file: Path, name: str, entry: object, start: int) -> TensorHeader:
    if not isinstance(entry, dict):
        raise _damaged(file, f"its entry for {name} is not an object")
    dtype, shape = entry.get("dtype"), _natural_numbers(entry.get("shape"))
    offsets = _natural_numbers(entry.get("data_offsets"))
    if dtype not in _ITEM_BITS or shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"its entry for {name} has no valid dtype, shape and data_offsets")
    nbytes = offsets[1] - offsets[0]
    if nbytes * 8 != math.prod(shape) * _ITEM_BITS[dtype]:
        raise _damaged(file, f"{name} of shape {list(shape)} and type {dtype} does not fill its {nbytes} bytes")
    return TensorHeader(name, dtype, shape, file, start + offsets[0], nbytes)


def _check_cover(file: Path, tensors: tuple[TensorHeader, ...], start: int, size: int) -> None:
    position = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset + tensor.nbytes > size:
            missing = tensor.offset + tensor.nbytes - size
            raise _damaged(file, f"{tensor.name} ends {missing} bytes behind the end of the file (truncated)")
        if tensor.offset != position:
            what = "overlaps another tensor" if tensor.offset < position else "follows a hole"
            raise _damaged(file, f"{tensor.name} {what}")
        position = tensor.offset + tensor.nbytes
    if position != size:
        raise _damaged(file, f"{size - position} bytes at its end belong to no tensor")
