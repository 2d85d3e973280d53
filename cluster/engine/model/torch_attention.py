"""Paged attention in torch operations: on any device, and the reference for the compiled kernels.

Decodes are batched, padded to the longest of a slice; chunks of prompts run one by one, in slices of their rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from cluster.domain.parallel_layout import ATTENTION_WORKSPACE_BYTES
from cluster.engine.model.attention_features import Features
from cluster.engine.model.block_tables import StepLayout
from cluster.engine.model.kv_cache import LayerPool

_SCORE_BYTES = 4  # attention scores are float32 where they are kept at all


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences that add one token each, alike in length.

    ``tokens``: [batch] indices into the step; ``blocks``: [batch, n] block ids; ``lengths``: [batch] tokens to attend
    to, the new one included.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    lengths: torch.Tensor


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pool: LayerPool,
    layout: StepLayout,
    features: Features,
) -> torch.Tensor:
    """See ``AttentionKernel``."""
    pool.write(layout.kv_slots, key, value)
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    for part in _decodes(layout, _positions_per_slice(query, pool)):
        out[part.tokens] = _decode(query[part.tokens], pool, part, features)
    for slot, start, count, first in layout.sequences[layout.sequences[:, 2] > 1].tolist():
        rows = slice(first, first + count)
        if start == 0 and features.plain and features.sees_all(count):
            out[rows] = _fresh(query[rows], key[rows], value[rows], features)
        else:
            blocks = layout.tables.tensor[slot, : -(-(start + count) // layout.block_size)]
            _prefill(query[rows], pool, blocks, start, features, out[rows])
    return out


def _positions_per_slice(query: torch.Tensor, pool: LayerPool) -> int:
    """KV positions, padding included, that a slice of decodes may gather."""
    width = pool.keys.shape[2] * (pool.keys.shape[3] + pool.values.shape[3])
    position_bytes = width * pool.keys.dtype.itemsize + 3 * query.shape[1] * _SCORE_BYTES
    return ATTENTION_WORKSPACE_BYTES // position_bytes


def _decodes(layout: StepLayout, positions: int) -> tuple[_Decodes, ...]:
    """The step's decodes, longest first, so that what is padded together is alike; each slice within its bound."""
    found = layout.memo.get((_Decodes, positions))
    if found is None:
        found = layout.memo[_Decodes, positions] = tuple(_slices(layout, positions))
    assert isinstance(found, tuple)
    return found


def _slices(layout: StepLayout, positions: int) -> Iterator[_Decodes]:
    singles = layout.sequences[layout.sequences[:, 2] == 1]
    singles = singles[np.argsort(-singles[:, 1], kind="stable")]
    device = layout.tables.tensor.device
    while len(singles):
        width = int(singles[0, 1]) // layout.block_size + 1
        count = max(1, positions // (width * layout.block_size))
        part, singles = singles[:count], singles[count:]
        slots, starts, _, firsts = (torch.from_numpy(column.copy()).to(device) for column in part.T)
        yield _Decodes(firsts, layout.tables.tensor[slots, :width], starts + 1)


def _decode(query: torch.Tensor, pool: LayerPool, part: _Decodes, features: Features) -> torch.Tensor:
    """``[batch, heads, value_dim]`` of a slice. The query heads of a KV head are its rows."""
    keys, values = pool.gather(part.blocks)  # [batch, length, kv_heads, dim]
    batch, length, kv_heads, _ = keys.shape
    rows = query.reshape(batch, kv_heads, -1, query.shape[-1])
    positions = torch.arange(length, device=keys.device)
    offsets = positions - (part.lengths[:, None] - 1)  # [batch, length]
    visible = offsets <= 0
    # What others left behind a sequence's end may be infinite or NaN (float16 overflows), and no weight hides that.
    keys, values = (tensor.masked_fill_(~visible[..., None, None], 0) for tensor in (keys, values))
    if features.window is not None:
        visible &= offsets > -features.window
    visible = visible[:, None, None]
    if features.block_sparse is not None:
        sparse = features.block_sparse.visible(part.lengths - 1, length)
        visible = visible & sparse.unflatten(1, (kv_heads, -1))  # [batch, kv_heads, group, length]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if features.plain:
        out = scaled_dot_product_attention(rows, keys, values, attn_mask=visible, scale=features.scaling)
    else:
        out = _explicit(rows, keys, values, offsets[:, None, None], visible, features)
    return out.reshape(batch, -1, values.shape[-1])


def _fresh(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, features: Features) -> torch.Tensor:
    """The first chunk of a prompt sees only itself."""
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=features.scaling, enable_gqa=True)
    return out[0].transpose(0, 1)


def _prefill(
    query: torch.Tensor, pool: LayerPool, blocks: torch.Tensor, start: int, features: Features, out: torch.Tensor
) -> None:
    """A chunk of one prompt, into ``[tokens, heads, value_dim]``."""
    count, stop, heads = query.shape[0], start + query.shape[0], query.shape[1]
    keys, values = (tensor[:stop].transpose(0, 1).unsqueeze(1) for tensor in pool.gather(blocks))
    kv_heads = keys.shape[0]
    positions = torch.arange(stop, device=query.device)
    # Three copies of the scores where they are made step by step, or where the mask is as large as they are.
    copies = 1 if features.plain and features.block_sparse is None else 3
    rows = max(1, ATTENTION_WORKSPACE_BYTES // (heads * stop * _SCORE_BYTES * copies))
    for first in range(0, count, rows):
        part = query[first : first + rows]
        offsets = positions - positions[start + first : start + first + part.shape[0], None]  # [rows, length]
        visible = offsets <= 0
        if features.window is not None:
            visible &= offsets > -features.window
        if features.block_sparse is not None:
            sparse = features.block_sparse.visible(offsets[:, 0].neg(), stop)  # the first key's position is 0
            visible = visible & sparse.transpose(0, 1).unflatten(0, (kv_heads, -1))  # [kv_heads, group, rows, length]
        grouped = part.transpose(0, 1).unflatten(0, (kv_heads, -1))  # [kv_heads, group, rows, key_dim]
        if features.plain:
            shape = (*grouped.shape[:2], stop)
            got = scaled_dot_product_attention(
                grouped,
                keys.expand(*shape, keys.shape[-1]),
                values.expand(*shape, values.shape[-1]),
                attn_mask=visible,
                scale=features.scaling,
            )
        else:
            got = _explicit(grouped, keys, values, offsets, visible, features)
        out[first : first + rows] = got.flatten(0, 1).transpose(0, 1)


def _explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    visible: torch.Tensor,
    features: Features,
) -> torch.Tensor:
    """Attention with every feature.

    In a prefill ``query`` is ``[kv_heads, group, rows, key_dim]``, in a decode
    ``[batch, kv_heads, group, key_dim]``; offsets (key position - query position), which have as many dimensions in a
    decode and two in a prefill, and ``visible`` broadcast to the scores.
    """
    scores = (query @ keys.transpose(-1, -2)).float() * features.scaling
    if features.softcap is not None:
        scores = torch.tanh(scores / features.softcap) * features.softcap
    per_head = (-1, *query.shape[1:2], 1, 1) if offsets.dim() == 2 else (1, *query.shape[1:3], 1)
    if features.alibi_slopes is not None:
        scores = scores + features.alibi_slopes.float().view(per_head) * offsets
    if features.alibi_table is not None:
        length = scores.shape[-1]  # the keys are those of positions 0, 1, ...
        scores = scores + features.alibi_table[:, :length].reshape(*per_head[:-1], length)
    scores = scores.masked_fill(~visible, -torch.inf)
    if features.sinks is not None:
        sinks = features.sinks.float().view(per_head).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        scores = scores.softmax(-1)
    return scores.to(values.dtype) @ values
