"""DeepSpeed's shard sizes, re-stated (``deepspeed/module_inject/tp_shard.py`` of 0.19.8).

Neither torch nor DeepSpeed is imported here; a test compares both for every published shape.
"""

from __future__ import annotations

from cluster.checkpoint.tensors import SplitKind, TensorSpec

_MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_HEAD_NAMES = ("lm_head", "embed_out")


def shard_sizes(
    total: int, tensor_parallel_size: int, *, num_kv_heads: int | None, grain: int, module: str
) -> tuple[int, ...]:
    """How many of ``total`` rows or columns each rank gets; they sum to ``total``.

    A dimension that the KV heads divide goes by whole heads, the first ranks taking one more; those of the
    feed-forward part and of the head (told by the ``module``'s name) go by grains of ``grain``, what is left
    over to the last rank.
    """
    by_heads = (
        num_kv_heads is not None
        and total % num_kv_heads == 0
        and "mlp" not in module
        and module not in _HEAD_NAMES
        and not any(name in module for name in _MLP_NAMES)
    )
    if by_heads:
        assert num_kv_heads is not None
        return tuple(total * share // num_kv_heads for share in even_shares(num_kv_heads, tensor_parallel_size))
    if total < grain:
        return even_shares(total, tensor_parallel_size)
    grains, rest = divmod(total, grain)
    sizes = [share * grain for share in even_shares(grains, tensor_parallel_size)]
    sizes[-1] += rest
    return tuple(sizes)


def even_shares(total: int, parts: int) -> tuple[int, ...]:
    """``total`` things among ``parts``, the first ones taking one more."""
    return tuple(total // parts + (index < total % parts) for index in range(parts))


def shard_shapes(
    tensor: TensorSpec, tensor_parallel_size: int, *, num_kv_heads: int | None, grain: int
) -> tuple[tuple[int, ...], ...]:
    """The shape of ``tensor`` on every rank of a tensor-parallel group."""
    if tensor.split.kind is SplitKind.REPLICATED:
        return (tensor.shape,) * tensor_parallel_size
    dim = 0 if tensor.split.kind is SplitKind.COLUMN else 1
    widths = [0] * tensor_parallel_size
    for part in tensor.split.parts or (tensor.shape[dim],):
        sizes = shard_sizes(part, tensor_parallel_size, num_kv_heads=num_kv_heads, grain=grain, module=tensor.module)
        widths = [width + size for width, size in zip(widths, sizes, strict=True)]
    return tuple((*tensor.shape[:dim], width, *tensor.shape[dim + 1 :]) for width in widths)
