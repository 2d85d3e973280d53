"""Weights out of nothing: every element a function of the tensor's key and its own index, so every layout agrees.

The function is a 32-bit integer hash (two multiplications between xor-shifts), computed in blocks that stay in the
processor's cache. Whoever asks for a slice gets the same numbers as whoever asks for all.
"""

from __future__ import annotations

import math

import torch

from cluster.checkpoint.headers import TensorHeader

_BLOCK = 2**16
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
# A norm's weights lie around one, other vectors around zero.
_NORM_SPREAD, _BIAS_SPREAD = 0.1, 0.02


def fill(view: memoryview, header: TensorHeader, first_byte: int, dtype: torch.dtype) -> None:
    """Fills ``view`` with the bytes of ``header``'s tensor that begin at its byte ``first_byte``."""
    key = header.dummy_key
    assert key is not None, header
    centre, spread = scale(header.name, header.shape)
    out = torch.frombuffer(view, dtype=dtype)
    first = first_byte // dtype.itemsize
    count = min(_BLOCK, out.numel())
    indices = torch.arange(count, dtype=torch.int32)
    numbers, shifted, values = torch.empty_like(indices), torch.empty_like(indices), torch.empty(count)
    for begin in range(0, out.numel(), _BLOCK):
        n = min(count, out.numel() - begin)
        _hash(indices[:n], first + begin, key, numbers[:n], shifted[:n])
        out[begin : begin + n].copy_(values[:n].copy_(numbers[:n]).mul_(spread / 2**31).add_(centre))


def scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(centre, greatest distance from it) of a tensor's values, which are spread evenly.

    A matrix keeps the variance of what it multiplies (3 / columns is the variance-preserving square of the distance),
    so that hidden states and logits stay of order one in every element type.
    """
    if len(shape) >= 2:
        return 0.0, math.sqrt(3 / max(1, shape[-1]))
    return (1.0, _NORM_SPREAD) if name.endswith("weight") else (0.0, _BIAS_SPREAD)


def _hash(indices: torch.Tensor, first: int, key: int, out: torch.Tensor, shifted: torch.Tensor) -> None:
    """``indices`` + ``first`` mixed with the 64 bits of ``key`` into ``out``: int32, even over its whole range."""
    torch.add(indices, _int32(first + key), out=out)
    # torch shifts signs in from the left; the masks take them out. A last such step would only reach low bits.
    torch.bitwise_right_shift(out, 16, out=shifted).bitwise_and_(0xFFFF)
    out.bitwise_xor_(shifted).mul_(_MULTIPLIERS[0])
    torch.bitwise_right_shift(out, 15, out=shifted).bitwise_and_(0x1FFFF)
    out.bitwise_xor_(shifted).bitwise_xor_(_int32(key >> 32)).mul_(_MULTIPLIERS[1])


def _int32(value: int) -> int:
    """The lowest 32 bits of ``value`` as a signed number."""
    return (value + 2**31) % 2**32 - 2**31
