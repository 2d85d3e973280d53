"""Paged attention by the compiled CPU kernel, which reads blocks where they lie: no gathering, no padding."""

from __future__ import annotations

import ctypes
from typing import cast

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
    assert key.dtype == value.dtype == query.dtype == pool.keys.dtype, (query.dtype, key.dtype, pool.keys.dtype)
    assert query.stride(2) == key.stride(2) == value.stride(2) == 1
    tokens, heads, _ = query.shape
    layer = _Layer(heads, pool, features)
    call = layer.call
    call.query, call.key, call.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
    call.query_token, call.query_head, _ = query.stride()
    call.key_token, call.key_head, _ = key.stride()
    call.value_token, call.value_head, _ = value.stride()
    return layer.run(query.new_empty(tokens, heads, value.shape[2]), tokens, layout)


class MergedAttention:
    """One layer's attention, straight from the product of its merged q, k and v.

    Queries and keys are rotated, keys and values stored, and all of it attended to in one call of the library:
    nothing is split, copied or transposed before.
    """

    def __init__(self, heads: int, pool: LayerPool, features: Features) -> None:
        """``pool`` tells the KV heads and their widths; ``features`` without ``block_sparse``."""
        assert features.block_sparse is None, "these layers are torch_attention's"
        self._layer = _Layer(heads, pool, features)
        self._dtype = pool.keys.dtype
        _, _, kv_heads, self._key_dim = pool.keys.shape
        value_dim = pool.values.shape[3]
        call, size = self._layer.call, self._dtype.itemsize
        self._key_at = heads * self._key_dim * size
        self._value_at = self._key_at + kv_heads * self._key_dim * size
        self._width, self._out_width = (heads + kv_heads) * self._key_dim + kv_heads * value_dim, heads * value_dim
        call.query_head = call.key_head = self._key_dim
        call.value_head = value_dim

    def __call__(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        """Attends for the tokens of a step; returns ``[1, tokens, heads * value_dim]``.

        ``qkv`` ``[1, tokens, width]``: all heads of q, then of k, then of v; ``cos``, ``sin`` ``[1, tokens, key_dim]``.
        """
        _, tokens, width = qkv.shape
        assert width == self._width, (width, self._width)
        self._check(qkv, cos, sin)
        call, start = self._layer.call, qkv.data_ptr()
        call.query, call.key, call.value = start, start + self._key_at, start + self._value_at
        call.query_token = call.key_token = call.value_token = qkv.stride(1)
        call.cosine, call.sine, call.angle_token = cos.data_ptr(), sin.data_ptr(), cos.stride(1)
        return self._layer.run(qkv.new_empty(1, tokens, self._out_width), tokens, layout)

    def store(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: StepLayout) -> None:
        """Stores keys and values of a step that nobody attends in.

        ``rows`` as ``qkv`` above, or without the heads of q.
        """
        _, tokens, width = rows.shape
        queries = self._key_at if width == self._width else 0
        assert width * self._dtype.itemsize - queries == self._width * self._dtype.itemsize - self._key_at, width
        assert tokens == layout.num_tokens, (tokens, layout.num_tokens)
        self._check(rows, cos, sin)
        call, start = self._layer.begin(layout), rows.data_ptr() + queries
        call.key, call.value = start, start + self._value_at - self._key_at
        call.key_token = call.value_token = rows.stride(1)
        call.cosine, call.sine, call.angle_token = cos.data_ptr(), sin.data_ptr(), cos.stride(1)
        self._layer.store(tokens)

    def _check(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        assert cos.shape == (1, rows.shape[1], self._key_dim), (cos.shape, rows.shape)
        assert rows.dtype is cos.dtype is sin.dtype is self._dtype, (rows.dtype, cos.dtype, self._dtype)

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of a token in the product that it takes, and in its result."""
        return self._width, self._out_width

    def begin(self, cos: torch.Tensor, sin: torch.Tensor, layout: StepLayout) -> int:
        """The address of the library's call for this step, for a caller that fills in rows, results and threads."""
        call = self._layer.begin(layout)
        call.cosine, call.sine, call.angle_token = cos.data_ptr(), sin.data_ptr(), cos.stride(1)
        return ctypes.addressof(call)


class _Layer:
    """The library's attention with all that a layer alone decides filled in."""

    def __init__(self, heads: int, pool: LayerPool, features: Features) -> None:
        library = kernels.load()
        assert library is not None
        assert features.window is None or features.window >= 1, features.window
        self._pool = pool  # and what follows: the library has their addresses
        self._sinks, self._slopes = _floats(features.sinks, heads), _floats(features.alibi_slopes, heads)
        self._bias = bias = features.alibi_table
        if bias is not None:
            assert bias.dtype == torch.float32
            assert bias.is_contiguous()
            assert bias.shape[0] == heads, (bias.shape, heads)
        _, block_size, kv_heads, key_dim = pool.keys.shape
        self._function, self._store = library.attention[pool.keys.dtype], library.store[pool.keys.dtype]
        self.call = kernels.AttentionCall(
            key_pool=pool.keys.data_ptr(), value_pool=pool.values.data_ptr(),
            sinks=_address(self._sinks), slopes=_address(self._slopes), bias=_address(bias),
            heads=heads, kv_heads=kv_heads, key_dim=key_dim, value_dim=pool.values.shape[3], block_size=block_size,
            window=features.window or 0, bias_width=0 if bias is None else bias.shape[1],
            scaling=features.scaling, softcap=features.softcap or 0.0,
        )  # fmt: skip
        self._where = ctypes.byref(self.call)

    def begin(self, layout: StepLayout) -> kernels.AttentionCall:
        """The call, which knows this step's sequences now."""
        call = self.call
        assert self._bias is None or self._bias.shape[1] >= _longest(layout), "the table ends before a sequence does"
        call.tables, call.sequences, call.kv_slots, call.table_width, call.num_sequences = _addresses(layout)
        return call

    def run(self, out: torch.Tensor, tokens: int, layout: StepLayout) -> torch.Tensor:
        """Fills ``out``; ``call`` knows this step's rows by now."""
        assert tokens == layout.num_tokens, (tokens, layout.num_tokens)
        call = self.begin(layout)
        call.out, call.tokens, call.threads = out.data_ptr(), tokens, torch.get_num_threads()
        self._function(self._where)
        return out

    def store(self, tokens: int) -> None:
        """``call`` knows this step and its keys and values by now."""
        self.call.tokens, self.call.threads = tokens, torch.get_num_threads()
        self._store(self._where)


def _addresses(layout: StepLayout) -> tuple[int, int, int, int, int]:
    """What the library asks of a layout, kept for the other layers of the step."""
    found = layout.memo.get(_addresses)
    if found is None:
        found = (
            layout.tables.tensor.data_ptr(), layout.sequences.ctypes.data, layout.kv_slots.data_ptr(),
            layout.tables.host.shape[1], len(layout.sequences),
        )  # fmt: skip
        layout.memo[_addresses] = found
    return cast("tuple[int, int, int, int, int]", found)


def _longest(layout: StepLayout) -> int:
    """One past the largest position of the step."""
    return int((layout.sequences[:, 1] + layout.sequences[:, 2]).max())


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _floats(per_head: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    if per_head is None:
        return None
    assert per_head.numel() == heads, (per_head.shape, heads)
    return per_head.detach().float().contiguous()
