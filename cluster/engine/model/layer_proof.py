"""A decoder layer's own forward and one of ours on the same tokens: what each computed, and what it kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cluster.engine.model import agreement
from cluster.engine.model.attention import Bound, choose_kernel
from cluster.engine.model.attention_features import Features
from cluster.engine.model.block_tables import BlockTables, StepLayout, layout_step
from cluster.engine.model.kv_cache import LayerPool, PagedKVCache
from cluster.engine.step import SequenceKey, StepEntry

Forward = Callable[..., torch.Tensor]
CPU = torch.device("cpu")
# Positions that a layer may go by beside its angles, far ones too (Ministral 3 scales its queries by them).
_POSITIONS = (0, 1, 7, 100, 5_000, 20_000, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What the attention of a layer was called with, and what it kept."""

    query: torch.Tensor  # [tokens, heads, key_dim]
    key: torch.Tensor
    value: torch.Tensor
    features: Features
    pool: LayerPool


class LayerProof:
    """Passes over a prompt of a few tokens, of all sizes and at positions near and far.

    On demand, over some more of them: enough for what products of ours do with many (``products.MANY_ROWS``).
    """

    def __init__(self, attention: Any, width: int, dtype: torch.dtype) -> None:
        self._attention, self._kernel = attention, choose_kernel(dtype, CPU)
        self.hidden = agreement.at_all_scales(width, dtype)
        self._more = torch.cat([self.hidden, self.hidden[:, : agreement.ROWS]], dim=1)
        self._tokens = tokens = self._more.shape[1]
        cos, sin = agreement.random(2, 1, tokens, attention.head_dim, dtype=dtype).unbind(0)
        few = self.hidden.shape[1]
        self._angles, self.angles = (cos, sin), (cos[:, :few], sin[:, :few])
        self._positions = torch.tensor([(_POSITIONS * tokens)[:tokens]])
        self._cache = PagedKVCache({}, 0, tokens, dtype, CPU)

    def _arguments(self, tokens: int) -> dict[str, Any]:
        """Of a layer's forward over the first ``tokens``, for which the cache is made ready."""
        tables, entry = (
            BlockTables(1, 1, CPU),
            StepEntry(SequenceKey(0, 0), 0, (0,) * tokens, 0, 0, (0,), True, tokens),
        )
        tables.apply([entry])
        self._cache.layout = layout_step([entry], tables, self._tokens)
        cos, sin = self._angles
        return {
            "position_embeddings": (cos[:, :tokens], sin[:, :tokens]), "attention_mask": None,
            "position_ids": self._positions[:, :tokens], "past_key_values": None, "use_cache": False,
        }  # fmt: skip

    def original(self, forward: Forward) -> tuple[torch.Tensor, AttentionCall]:
        """The result of the layer's own forward, and its one call of the attention."""
        seen: list[AttentionCall] = []

        def record(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            pool: LayerPool,
            layout: StepLayout,
            features: Features,
        ) -> torch.Tensor:
            pool = self._pool(key, value)  # of the sizes that are known by now
            seen.append(AttentionCall(query, key, value, features, pool))
            return self._kernel(query, key, value, pool, layout, features)

        nothing = self.hidden.new_empty(0, 0, 0, 0)
        self._attention.paged = Bound(self._cache, LayerPool(nothing, nothing), record)
        expected = forward(self.hidden.clone(), **self._arguments(self.hidden.shape[1]))
        (call,) = seen
        return expected, call

    def mine(self, forward: Forward, seen: AttentionCall, *, more: bool = False) -> tuple[torch.Tensor, LayerPool]:
        """The result of ``forward``, and what it kept; ``more``: over more tokens than the original was asked for."""
        given = self._more if more else self.hidden
        pool = self._pool(seen.key, seen.value)
        self._attention.paged = Bound(self._cache, pool, self._kernel)
        hidden = given.clone()
        got = forward(hidden, **self._arguments(given.shape[1]))
        assert torch.equal(hidden, given), "a layer's input is the residual of others"
        return got, pool

    def _pool(self, key: torch.Tensor, value: torch.Tensor) -> LayerPool:
        return LayerPool(*(x.new_zeros(1, self._tokens, *x.shape[1:]) for x in (key, value)))
