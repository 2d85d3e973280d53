"""What attention modules differ in, beside their shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Features:
    """How scores are made, for query position i and key position j <= i.

    score = scaling * q.k; with ``softcap`` c: c * tanh(score / c) (Gemma-2); with ``alibi_slopes`` ``[heads]``:
    + slope * (j - i) (Press et al. 2022; a constant per query does not change the softmax). ``window``: only
    j > i - window is seen. ``sinks`` ``[heads]``: one more score per head that takes part in the softmax and has no
    value (GPT-OSS). ``alibi_table`` ``[heads, positions]``, in float32: + table[j], for families whose ALiBi is no
    straight line (Falcon rounds it). Softmax is done in float32.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    alibi_table: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether scores can be left to ``scaled_dot_product_attention``."""
        given = (self.softcap, self.sinks, self.alibi_slopes, self.alibi_table)
        return all(feature is None for feature in given)
