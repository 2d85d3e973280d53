"""Paged attention behind transformers' attention interface.

The KV cache of a rank is one pool per layer, ``[blocks, block_size, kv_heads, head_dim]`` for keys and for values. A
step's tokens come packed as ``[1, tokens]``; ``StepLayout`` says which block slots they go to, and which slots each
of them may look at. Sequences that add one token are batched together, chunks of a prompt run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from cluster.domain.parallel_layout import ATTENTION_WORKSPACE_BYTES
from cluster.engine.step import StepEntry

IMPLEMENTATION = "llm_cluster_paged"
_SCORE_BYTES = 4  # attention scores are float32 where they are kept at all


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``first .. last`` of the step belong to one sequence and stand at positions ``start ..`` of it."""

    first: int
    last: int
    start: int
    blocks: torch.Tensor  # [n] block ids, in order


@dataclass(frozen=True, slots=True)
class DecodeSlice:
    """Decodes that are attended to together, alike in length.

    ``rows``: [batch] indices into the step's decodes; ``blocks``: [batch, n] block ids, padded with block 0;
    ``lengths``: [batch] tokens to attend to, the new one included.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences that add one token each; ``tokens``: [batch] indices into the step."""

    tokens: torch.Tensor
    slices: tuple[DecodeSlice, ...]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where a step's tokens go in the KV cache, and what they look at."""

    slots: torch.Tensor  # [tokens] block id * block size + offset
    decodes: Decodes | None
    chunks: tuple[Chunk, ...]


def layout_step(
    entries: tuple[StepEntry, ...], block_size: int, device: torch.device, slice_blocks: int = 2**30
) -> StepLayout:
    """The layout of the packed tokens of ``entries``, in their order.

    ``slice_blocks``: KV blocks, padding included, that a slice of decodes may gather; one sequence is always allowed.
    """
    slots: list[int] = []
    chunks: list[Chunk] = []
    decode_tokens: list[int] = []
    decode_blocks: list[tuple[int, ...]] = []
    lengths: list[int] = []
    first = 0
    for entry in entries:
        count = len(entry.token_ids)
        slots.extend(
            entry.block_ids[position // block_size] * block_size + position % block_size
            for position in range(entry.start, entry.start + count)
        )
        if count == 1:
            decode_tokens.append(first)
            decode_blocks.append(entry.block_ids)
            lengths.append(entry.start + 1)
        else:
            blocks = torch.tensor(entry.block_ids, dtype=torch.long, device=device)
            chunks.append(Chunk(first, first + count, entry.start, blocks))
        first += count
    decodes = None
    if decode_tokens:
        tokens = torch.tensor(decode_tokens, dtype=torch.long, device=device)
        decodes = Decodes(tokens, tuple(_slices(decode_blocks, lengths, device, slice_blocks)))
    return StepLayout(torch.tensor(slots, dtype=torch.long, device=device), decodes, tuple(chunks))


def _slices(
    blocks: list[tuple[int, ...]], lengths: list[int], device: torch.device, slice_blocks: int
) -> Iterator[DecodeSlice]:
    """Longest first, so that what is padded together is alike; each slice within its bound."""
    order = sorted(range(len(blocks)), key=lambda i: -len(blocks[i]))
    while order:
        width = len(blocks[order[0]])
        count = max(1, slice_blocks // width)
        rows, order = order[:count], order[count:]
        padded = [blocks[i] + (0,) * (width - len(blocks[i])) for i in rows]
        yield DecodeSlice(
            torch.tensor(rows, dtype=torch.long, device=device),
            torch.tensor(padded, dtype=torch.long, device=device),
            torch.tensor([lengths[i] for i in rows], dtype=torch.long, device=device),
        )


class PagedKVCache:
    """One rank's KV pool for all its layers. ``layout`` is set anew for every step."""

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        shape = (num_layers, num_blocks, block_size, kv_heads, head_dim)
        self.keys = _zeros(shape, dtype, device)
        self.values = _zeros(shape, dtype, device)
        self.block_size = block_size
        self.slice_blocks = ATTENTION_WORKSPACE_BYTES // (2 * block_size * kv_heads * head_dim * dtype.itemsize)
        self.layout: StepLayout | None = None

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores the step's ``[tokens, kv_heads, head_dim]`` at its slots."""
        assert self.layout is not None
        self.keys[layer].flatten(0, 1).index_copy_(0, self.layout.slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, self.layout.slots, value)

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole blocks: ``[..., n]`` ids -> ``[..., n * block_size, kv_heads, head_dim]``."""
        shape = (*blocks.shape[:-1], blocks.shape[-1] * self.block_size, *self.keys.shape[-2:])
        return self.keys[layer][blocks].view(shape), self.values[layer][blocks].view(shape)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU pages that become real only when they are written, so that an unused cache costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def install(model: nn.Module, cache: PagedKVCache) -> None:
    """Gives every attention module of ``model`` its pool; ``model`` was built with IMPLEMENTATION."""
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "head_dim"):
            setattr(module, "paged_cache", cache)  # noqa: B010 - mypy knows no new attributes of modules


def register() -> None:
    """Makes IMPLEMENTATION known to transformers. It has no mask function: transformers then makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a step's tokens over their own sequences.

    query ``[1, heads, tokens, head_dim]``, key and value ``[1, kv_heads, tokens, head_dim]`` (this rank's heads);
    returns ``[1, tokens, heads, head_dim]``. ``sliding_window`` counts the token itself.
    """
    assert attention_mask is None, "the step's layout says who sees whom"
    cache = module.paged_cache
    assert isinstance(cache, PagedKVCache)
    layout, layer = cache.layout, module.layer_idx
    assert layout is not None
    assert isinstance(layer, int)
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    cache.write(layer, keys, values)
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    if layout.decodes is not None:
        out[layout.decodes.tokens] = _decode(query[0], cache, layer, layout.decodes, scaling, sliding_window)
    for chunk in layout.chunks:
        part = query[:, :, chunk.first : chunk.last]
        fresh = (key[:, :, chunk.first : chunk.last], value[:, :, chunk.first : chunk.last])
        out[chunk.first : chunk.last] = _prefill(part, fresh, cache, layer, chunk, scaling, sliding_window)
    return out.unsqueeze(0), None


def _decode(
    query: torch.Tensor, cache: PagedKVCache, layer: int, decodes: Decodes, scaling: float | None, window: int | None
) -> torch.Tensor:
    """One token of each sequence: ``[batch, heads, head_dim]``, in slices that keep to the workspace."""
    rows = query[:, decodes.tokens].transpose(0, 1)  # [batch, heads, head_dim]
    out = torch.empty_like(rows)
    for part in decodes.slices:
        out[part.rows] = _decode_slice(rows[part.rows], cache, layer, part, scaling, window)
    return out


def _decode_slice(
    rows: torch.Tensor, cache: PagedKVCache, layer: int, part: DecodeSlice, scaling: float | None, window: int | None
) -> torch.Tensor:
    """``[batch, heads, head_dim]`` of a slice. The query heads of a KV head are its rows."""
    keys, values = cache.gather(layer, part.blocks)  # [batch, length, kv_heads, head_dim]
    batch, length, kv_heads, head_dim = keys.shape
    rows = rows.reshape(batch, kv_heads, -1, head_dim)
    positions = torch.arange(length, device=keys.device)
    visible = positions < part.lengths[:, None]
    if window is not None:
        visible &= positions >= part.lengths[:, None] - window
    out = scaled_dot_product_attention(
        rows, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=visible[:, None, None, :], scale=scaling
    )
    return out.reshape(batch, -1, head_dim)


def _prefill(
    query: torch.Tensor, fresh: tuple[torch.Tensor, torch.Tensor], cache: PagedKVCache, layer: int, chunk: Chunk,
    scaling: float | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """A chunk of one prompt: ``[tokens, heads, head_dim]``."""
    count, stop = chunk.last - chunk.first, chunk.start + chunk.last - chunk.first
    if chunk.start == 0 and (window is None or window >= count):
        out = scaled_dot_product_attention(query, *fresh, is_causal=True, scale=scaling, enable_gqa=True)
        return out[0].transpose(0, 1)
    keys, values = cache.gather(layer, chunk.blocks)  # [length, kv_heads, head_dim]
    keys, values = keys[:stop].transpose(0, 1).unsqueeze(0), values[:stop].transpose(0, 1).unsqueeze(0)
    positions = torch.arange(stop, device=query.device)
    rows = max(1, ATTENTION_WORKSPACE_BYTES // (query.shape[1] * stop * _SCORE_BYTES))
    parts = []
    for first in range(0, count, rows):
        own = positions[chunk.start + first : min(chunk.start + first + rows, stop), None]
        visible = positions <= own
        if window is not None:
            visible &= positions > own - window
        part = query[:, :, first : first + rows]
        parts.append(
            scaled_dot_product_attention(part, keys, values, attn_mask=visible, scale=scaling, enable_gqa=True)
        )
    return torch.cat(parts, dim=2)[0].transpose(0, 1)
