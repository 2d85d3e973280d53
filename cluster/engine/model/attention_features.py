"""What attention modules differ in, beside their shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """Which keys a head sees, by blocks of ``block`` positions counted from the beginning of the sequence.

    Block q of queries sees the ``local_blocks`` blocks that end in it, and of those before every one with
    ``(k + phase) % stride == 0``; ``phases`` ``[heads]`` are the heads' own (Phi-3-small, arXiv 2404.14219).
    """

    block: int
    local_blocks: int
    stride: int
    phases: torch.Tensor

    @classmethod
    def strided(cls, heads: int, *, block: int, local_blocks: int, stride: int, alike: bool) -> BlockSparse:
        """Phases that spread the blocks over the heads, or are ``alike`` for all of them."""
        step = 0 if alike else max(1, stride // heads)
        return cls(block, local_blocks, stride, torch.arange(heads, device="cpu") * step + 1)

    def of_heads(self, heads: range) -> BlockSparse:
        """As for a module that has these heads alone."""
        return replace(self, phases=self.phases[heads.start : heads.stop].clone())

    def to(self, device: torch.device) -> BlockSparse:
        return replace(self, phases=self.phases.to(device))

    def visible(self, queries: torch.Tensor, length: int) -> torch.Tensor:
        """``[queries, heads, length]``: what queries at these positions see of positions 0, 1, ...; not yet causal."""
        keys = torch.arange(length, device=queries.device) // self.block
        near = queries[:, None] // self.block - keys < self.local_blocks
        far = (keys + self.phases[:, None]) % self.stride == 0
        return near[:, None] | far


@dataclass(frozen=True, slots=True)
class Features:
    """How scores are made, for query position i and key position j <= i.

    score = scaling * q.k; with ``softcap`` c: c * tanh(score / c) (Gemma-2); with ``alibi_slopes`` ``[heads]``:
    + slope * (j - i) (Press et al. 2022; a constant per query does not change the softmax). ``window``: only
    j > i - window is seen. ``sinks`` ``[heads]``: one more score per head that takes part in the softmax and has no
    value (GPT-OSS). ``alibi_table`` ``[heads, positions]``, in float32: + table[j], for families whose ALiBi is no
    straight line (Falcon rounds it). ``block_sparse``: a head sees what both this and the window let it see. Softmax
    is done in float32.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    alibi_table: torch.Tensor | None = None
    block_sparse: BlockSparse | None = None

    @property
    def plain(self) -> bool:
        """Whether scores can be left to ``scaled_dot_product_attention``."""
        given = (self.softcap, self.sinks, self.alibi_slopes, self.alibi_table)
        return all(feature is None for feature in given)

    def sees_all(self, length: int) -> bool:
        """Whether in a sequence of ``length`` every query sees all keys up to itself."""
        sparse = self.block_sparse
        return (self.window is None or self.window >= length) and (
            sparse is None or sparse.local_blocks * sparse.block >= length
        )
