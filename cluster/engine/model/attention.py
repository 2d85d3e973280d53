"""Paged attention behind transformers' attention interface: one contract, several kernels.

A step's tokens come packed as ``[1, tokens]``; ``StepLayout`` says which sequence each of them belongs to. A kernel
stores their keys and values in the layer's pool and lets every token attend to its own sequence up to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from cluster.engine.model import kernels, native_attention, torch_attention
from cluster.engine.model.attention_features import BlockSparse, Features
from cluster.engine.model.block_tables import BlockTables, StepLayout, layout_step
from cluster.engine.model.kv_cache import LayerKV, LayerPool, PagedKVCache

__all__ = [
    "IMPLEMENTATION", "AttentionKernel", "BlockTables", "Features", "LayerKV", "PagedKVCache", "StepLayout",
    "install", "layout_step", "paged_attention", "register",
]  # fmt: skip

IMPLEMENTATION = "llm_cluster_paged"


class AttentionKernel(Protocol):
    """Stores a step's keys and values, and attends.

    query ``[tokens, heads, key_dim]``, key ``[tokens, kv_heads, key_dim]``, value ``[tokens, kv_heads, value_dim]``,
    any strides but unit stride in the last dimension; returns ``[tokens, heads, value_dim]``, contiguous. Head h looks
    at KV head ``h // (heads // kv_heads)``. No sequence reads what another one stores in the same step. Temporary
    memory beside the output stays within ATTENTION_WORKSPACE_BYTES, unless one full-length sequence gathered once needs
    more.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pool: LayerPool,
        layout: StepLayout,
        features: Features,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Bound:
    """What an attention module of this rank attends with."""

    cache: PagedKVCache
    pool: LayerPool
    kernel: AttentionKernel


def choose_kernel(dtype: torch.dtype, device: torch.device) -> AttentionKernel:
    """The compiled kernel on CPUs where it was built and knows the dtype, else the torch one."""
    if device.type == "cpu" and native_attention.supports(dtype) and kernels.load() is not None:
        return native_attention.attend
    return torch_attention.attend


def install(model: nn.Module, cache: PagedKVCache) -> None:
    """Gives every attention module of ``model`` (those with a ``layer_idx`` that the cache has) its pool."""
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index in cache.pools:
            pool = cache.pools[index]
            device = pool.keys.device
            for name in ("alibi_slopes", "alibi_table"):
                if hasattr(module, name):
                    setattr(module, name, getattr(module, name).to(device))
            sparse = getattr(module, "block_sparse", None)
            if isinstance(sparse, BlockSparse):
                setattr(module, "block_sparse", sparse.to(device))  # noqa: B010 - as below
            bound = Bound(cache, pool, choose_kernel(pool.keys.dtype, device))
            setattr(module, "paged", bound)  # noqa: B010 - mypy knows no new attributes of modules


def register() -> None:
    """Makes IMPLEMENTATION known to transformers. It has no mask function: transformers then makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)


def paged_attention(  # noqa: PLR0913, PLR0917 - the interface is transformers'
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a step's tokens over their own sequences.

    query ``[1, heads, tokens, key_dim]``, key and value ``[1, kv_heads, tokens, dim]`` (this rank's heads); returns
    ``[1, tokens, heads, value_dim]``. ``scaling`` None: ``key_dim ** -0.5``; the rest as in ``Features``;
    ``module.alibi_slopes`` and ``module.block_sparse`` where a family set them, ``module.mask_window`` where a family
    tells its window to its masks only.
    """
    assert attention_mask is None, "the step's layout says who sees whom"
    bound = module.paged
    assert isinstance(bound, Bound)
    layout = bound.cache.layout
    assert layout is not None
    features = Features(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=getattr(module, "mask_window", sliding_window),
        softcap=softcap,
        sinks=s_aux,
        alibi_slopes=getattr(module, "alibi_slopes", None),
        alibi_table=getattr(module, "alibi_table", None),
        block_sparse=getattr(module, "block_sparse", None),
    )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return bound.kernel(query, key, value, bound.pool, layout, features).unsqueeze(0), None
