"""A root-mean-square norm over all heads together (OLMo-2), where each rank has some of the heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cluster.domain.errors import UnsupportedModelError

Sum = Callable[[torch.Tensor], torch.Tensor]
_WIDTH, _ROWS = 24, 3


class WideRMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x**2) + eps)``, the mean over ``width`` numbers of which this rank has its heads'.

    ``share``: how much of this rank's sum counts, less than one where several ranks have the same head.
    """

    def __init__(self, weight: nn.Parameter, eps: float, width: int, share: float, sum_over_ranks: Sum) -> None:
        super().__init__()
        self.weight = weight
        self._eps, self._width, self._share, self._sum = eps, width, share, sum_over_ranks

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        total = self._sum(wide.pow(2).sum(-1, keepdim=True) * self._share)
        return (self.weight * (wide * torch.rsqrt(total / self._width + self._eps))).to(hidden.dtype)


def wide_norm(module: Any, name: str, width: int, share: float, sum_over_ranks: Sum) -> WideRMSNorm:
    """``module`` (its weight cut already) over several ranks; UnsupportedModelError when it computes something else."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(eps, float) and _is_rms_norm(module, eps):
        return WideRMSNorm(module.weight, eps, width, share, sum_over_ranks)
    raise UnsupportedModelError(
        f"{name} is a norm over all heads that is not understood; serve this model with --tensor-parallel-size 1."
    )


def _is_rms_norm(module: Any, eps: float) -> bool:
    """Whether a small copy of ``module`` computes what WideRMSNorm does."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(_WIDTH, generator=generator), requires_grad=False)
    small = copy.deepcopy(module)
    small.weight = weight
    given = torch.randn(_ROWS, _WIDTH, generator=generator) * eps**0.5  # so that eps counts
    mine = WideRMSNorm(weight, eps, _WIDTH, 1.0, lambda total: total)
    try:
        return bool(torch.allclose(small(given), mine(given), rtol=1e-5, atol=1e-6))
    except (RuntimeError, TypeError, ValueError):
        return False
