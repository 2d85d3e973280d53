"""top-k, then top-p (Holtzman et al. 2019), then min-p (Nguyen et al. 2024), on a few candidates wherever they suffice.

A filter keeps a prefix of a row's tokens in falling order, so the best 64 nearly always hold all that is kept, and a
whole row (a sort of 128,256 numbers) is looked at only where they do not. Whether they do depends on the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Candidates looked at, one after the other, before the whole row.
WIDTHS = (64, 1024, 8192)


@dataclass(frozen=True, slots=True)
class FilterParams:
    """One value for each row: ``temperature`` > 0, ``top_k`` 0 = off, ``top_p`` 1 = off, ``min_p`` 0 = off."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def rows(self, index: torch.Tensor) -> FilterParams:
        return FilterParams(self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index])


@dataclass(frozen=True, slots=True)
class Candidates:
    """``[rows, width]``: token ids in falling order of score, the smaller id first among equals.

    ``scores`` are float64 logits over temperature. ``kept`` marks what the filters leave. ``settled`` ``[rows]``
    says whether no token outside could have been kept.
    """

    token_ids: torch.Tensor
    scores: torch.Tensor
    kept: torch.Tensor
    settled: torch.Tensor


def weight_totals(logits: torch.Tensor, params: FilterParams) -> torch.Tensor:
    """``[rows]`` float64: the sum of exp(score - greatest score) over each whole row, which top-p alone needs.

    By ``log_softmax``: torch splits a plain sum over its threads in a way that depends on the number of rows.
    """
    scores = logits.double() / params.temperature[:, None]
    return scores.log_softmax(-1).amax(-1).neg_().exp_()


def filter_tokens(logits: torch.Tensor, params: FilterParams, totals: torch.Tensor, width: int) -> Candidates:
    """The ``width`` best tokens of each row, filtered; ``totals`` from ``weight_totals``, read where top-k is off."""
    whole = width >= logits.shape[-1]
    values, token_ids = _best(logits, width)
    scores = values.double() / params.temperature[:, None]
    by_k = _keep_top_k(scores, params.top_k)
    weights = (scores - scores[:, :1]).exp_()
    kept = by_k & _keep_top_p(weights * by_k, params, totals) & (weights >= params.min_p[:, None])
    if whole:
        return Candidates(token_ids, scores, kept, torch.ones_like(params.top_k, dtype=torch.bool))
    # What top-p sums over must be there in full, and equals of the last candidate may stand outside.
    decisive = torch.where((params.top_k > 0)[:, None], by_k, kept)
    settled = ~(decisive & (scores == scores[:, -1:])).any(-1)
    return Candidates(token_ids, scores, kept, settled)


def _best(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    if width >= logits.shape[-1]:
        ordered = logits.sort(dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    # topk leaves the order of equals open.
    best = logits.topk(width, dim=-1)
    token_ids, by_id = best.indices.sort(dim=-1)
    ordered = best.values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return ordered.values, token_ids.gather(-1, ordered.indices)


def _keep_top_k(scores: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """All that are not below the k-th; equals of the k-th stay."""
    last = torch.where(top_k > 0, top_k, scores.shape[-1]).clamp(max=scores.shape[-1]) - 1
    return scores >= scores.gather(-1, last[:, None])


def _keep_top_p(weights: torch.Tensor, params: FilterParams, totals: torch.Tensor) -> torch.Tensor:
    """Each token before which less than ``top_p`` of the probability stands; the best one always."""
    sums = weights.cumsum(-1)
    whole = torch.where(params.top_k > 0, sums[:, -1], totals)[:, None]
    return ((sums - weights) / whole < params.top_p[:, None]) | (params.top_p >= 1.0)[:, None]
