"""Paged attention by the compiled CPU kernel, which reads blocks where they lie: no gathering, no padding."""

from __future__ import annotations

import ctypes

import torch

from cluster.engine.model import kernels, torch_attention
from cluster.engine.model.attention_features import Features
from cluster.engine.model.block_tables import StepLayout
from cluster.engine.model.kv_cache import LayerPool


def supports(dtype: torch.dtype) -> bool:
    return dtype in {torch.float32, torch.bfloat16}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pool: LayerPool,
    layout: StepLayout,
    features: Features,
) -> torch.Tensor:
    """See ``AttentionKernel``. Works in tiles of a few hundred KiB per thread; leaves block-sparse layers to torch."""
    if features.block_sparse is not None:
        return torch_attention.attend(query, key, value, pool, layout, features)
    library = kernels.load()
    assert library is not None
    (tokens, heads, key_dim), (_, kv_heads, value_dim) = query.shape, value.shape
    assert key.dtype == value.dtype == query.dtype == pool.keys.dtype, (query.dtype, key.dtype, pool.keys.dtype)
    assert query.stride(2) == key.stride(2) == value.stride(2) == 1
    assert features.window is None or features.window >= 1, features.window
    out = torch.empty((tokens, heads, value_dim), dtype=query.dtype)
    sinks, slopes = _floats(features.sinks, heads), _floats(features.alibi_slopes, heads)
    bias = features.alibi_table
    if bias is not None:
        assert bias.dtype == torch.float32
        assert bias.is_contiguous()
        assert bias.shape[0] == heads, (bias.shape, heads)
        assert bias.shape[1] >= _longest(layout), "the table ends before a sequence does"
    tables, sequences = layout.tables.host, layout.sequences
    call = kernels.AttentionCall(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
        pool.keys.data_ptr(), pool.values.data_ptr(), layout.tables.tensor.data_ptr(), sequences.ctypes.data,
        layout.kv_slots.data_ptr(),
        0 if sinks is None else sinks.data_ptr(), 0 if slopes is None else slopes.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        tokens, heads, kv_heads, key_dim, value_dim, layout.block_size, tables.shape[1], len(sequences),
        features.window or 0, 0 if bias is None else bias.shape[1], library.threads,
        features.scaling, features.softcap or 0.0,
    )  # fmt: skip
    library.attention[query.dtype](ctypes.byref(call))
    return out


def _longest(layout: StepLayout) -> int:
    """One past the largest position of the step."""
    return int((layout.sequences[:, 1] + layout.sequences[:, 2]).max())


def _floats(per_head: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    if per_head is None:
        return None
    assert per_head.numel() == heads, (per_head.shape, heads)
    return per_head.detach().float().contiguous()
