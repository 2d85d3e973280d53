"""Whether a faster way computes what the original does: both are given the same random input, large and small."""

from __future__ import annotations

import torch

# The largest difference, relative to the largest number of the original's result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROWS = 5  # of the random inputs
# Their sizes where an operation is not linear: some families clamp what is large, and norms add something to what is
# small.
SCALES = (1.0, 1e-3, 1e4)


def agree(mine: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether two results are the same to the last bits."""
    if mine.shape != original.shape or mine.dtype != original.dtype:
        return False
    difference = (mine.float() - original.float()).abs().max()
    return bool(difference <= TOLERANCE[original.dtype] * original.float().abs().max())


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
