"""The KV pool of a rank: blocks of keys and values for each of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cluster.engine.model.block_tables import StepLayout


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer keeps of a token on this rank. Layers may differ."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Numbers per token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class LayerPool:
    """One layer's blocks: ``[blocks, block_size, kv_heads, key_dim]`` and ``[..., value_dim]``."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def block_size(self) -> int:
        return self.keys.shape[1]

    def write(self, kv_slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores ``[tokens, kv_heads, dim]`` of a step's tokens."""
        self.keys.flatten(0, 1).index_copy_(0, kv_slots, key)
        self.values.flatten(0, 1).index_copy_(0, kv_slots, value)

    def gather(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole blocks: ``[..., n]`` ids -> ``[..., n * block_size, kv_heads, dim]``."""
        length = (*blocks.shape[:-1], blocks.shape[-1] * self.block_size)
        keys, values = self.keys[blocks], self.values[blocks]
        return keys.view(*length, *keys.shape[-2:]), values.view(*length, *values.shape[-2:])


class PagedKVCache:
    """One rank's KV pool. ``layers``: by ``layer_idx`` of the attention module. ``layout`` is set anew in each step."""

    def __init__(
        self,
        layers: Mapping[int, LayerKV],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.pools = {
            index: LayerPool(
                _zeros((num_blocks, block_size, kv.kv_heads, kv.key_dim), dtype, device),
                _zeros((num_blocks, block_size, kv.kv_heads, kv.value_dim), dtype, device),
            )
            for index, kv in layers.items()
        }
        self.layout: StepLayout | None = None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU pages that become real only when they are written, so that an unused cache costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
