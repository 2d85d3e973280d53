"""Names in a checkpoint's headers: which of them are layers, and which nobody reads."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cluster.checkpoint.headers import TensorHeader

_NUMBERED = re.compile(r"^(.*?)\.(\d{1,6})\.")
# Buffers that old exports wrote and transformers computes itself.
_BUFFERS = re.compile(
    r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|\.rotary_pos_emb\..*)$"
)
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def stored_shapes(headers: Iterable[TensorHeader]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and shape of every stored parameter, sorted by name."""
    found = ((h.name, h.shape) for h in headers if h.dtype in _FLOATS and not _is_buffer(h))
    return tuple(sorted(found))


def stored_layer_prefix(shapes: Iterable[tuple[str, tuple[int, ...]]], num_layers: int) -> str:
    """What stands before a decoder layer's number; the list with as many numbers as the model has layers."""
    numbers: dict[str, set[int]] = {}
    for name, _ in shapes:
        match = _NUMBERED.match(name)
        if match:
            numbers.setdefault(match.group(1), set()).add(int(match.group(2)))
    if not numbers:
        return ""
    return min(numbers, key=lambda prefix: (abs(len(numbers[prefix]) - num_layers), prefix))


def _is_buffer(header: TensorHeader) -> bool:
    return bool(_BUFFERS.search(header.name)) and (len(header.shape) != 1 or "rotary" in header.name)
