"""Whether a faster way computes what the original does: both are given the same random input, large and small.

How far two right results may be apart: the last rounding of each puts them up to a spacing of their type (its eps,
relative to the largest number) from each other, and what one of them rounds on its way and the other does not (a gated
product before ``down``, a rotated key) shifts the sum behind it by as much again at most, usually by far less, since
the errors of its terms cancel. Products sum in float32 whatever they store, and sums of n terms in another order
differ by about sqrt(n) / 2 spacings of float32. On average over all numbers it is no more than half of that.

Right results are nearer: in the usual families within one spacing in bfloat16 (products, norms and whole layers bit by
bit, rotary embeddings and gated MLPs not) and 3e-6 in float32; a test holds that. In bfloat16 a wrong factor below
0.8 % would pass, which is what its numbers themselves are off by.
"""

from __future__ import annotations

import math

import torch

_SPACINGS = 2.0  # the last rounding's, and that of one on the way
_SUMMED = 2**14  # terms of a long sum

# The largest difference, relative to the largest number of the original's result.
TOLERANCE = {
    dtype: _SPACINGS * torch.finfo(dtype).eps + math.sqrt(_SUMMED) / 2 * torch.finfo(torch.float32).eps
    for dtype in (torch.float32, torch.bfloat16)
}
ROWS = 5  # of the random inputs
# Their sizes where an operation is not linear: some families clamp what is large, and norms add something to what is
# small.
SCALES = (1.0, 1e-3, 1e4)


def agree(mine: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether two results are the same to the last bits: at their worst, and twice as near on average."""
    if mine.shape != original.shape or mine.dtype != original.dtype:
        return False
    expected, tolerance = original.float(), TOLERANCE[original.dtype]
    difference, expected = (mine.float() - expected).abs(), expected.abs()
    return bool(difference.max() <= tolerance * expected.max() and difference.mean() <= tolerance / 2 * expected.mean())


def agree_at_all_scales(mine: torch.Tensor, original: torch.Tensor) -> bool:
    """``agree`` for each part of what was made of ``at_all_scales``; rows are dimension 1."""
    if mine.shape != original.shape:
        return False
    return all(agree(a, b) for a, b in zip(mine.split(ROWS, dim=1), original.split(ROWS, dim=1), strict=True))


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normally distributed numbers, the same ones on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype)


def at_all_scales(width: int, dtype: torch.dtype) -> torch.Tensor:
    """``[1, rows, width]``: ``ROWS`` random rows of each scale."""
    rows = random(1, ROWS, width, dtype=torch.float32)
    return torch.cat([rows * scale for scale in SCALES], dim=1).to(dtype)
