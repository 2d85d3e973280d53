"""OpenELM's layers, each with its own heads and width, from its config's multipliers.

The arithmetic is that of the published configuration class: multipliers go from their first to their last value
in equal steps, rounded to two digits; dimensions are rounded to a multiple and never below nine tenths.
"""

from __future__ import annotations

from typing import Any

from cluster.checkpoint.fields import Fields
from cluster.domain.errors import CheckpointError
from cluster.domain.model_spec import LayerShape


def openelm_layers(fields: Fields) -> tuple[LayerShape, ...]:
    """Every decoder layer's shape; explicit per-layer lists win over multipliers."""
    layers = fields.whole("num_transformer_layers", 12)
    model_dim, head_dim = fields.whole("model_dim", 2048), fields.whole("head_dim", 128)
    groups = fields.whole("num_gqa_groups", 1, absent_is_none=True)
    heads = _whole_list(fields.get("num_query_heads"), layers)
    if heads is None:
        multiple = head_dim * groups
        heads = [
            _make_divisible(model_dim * factor, multiple) // head_dim
            for factor in _spread(fields.get("qkv_multipliers"), layers, "qkv_multipliers")
        ]
    kv_heads = _whole_list(fields.get("num_kv_heads"), layers) or [count // groups for count in heads]
    divisor = fields.whole("ffn_dim_divisor", 256)
    ffn = [
        _make_divisible(model_dim * factor, divisor)
        for factor in _spread(fields.get("ffn_multipliers"), layers, "ffn_multipliers")
    ]
    if any(count % kv for count, kv in zip(heads, kv_heads, strict=True)):
        raise CheckpointError("config.json: num_query_heads are no multiples of num_kv_heads.")
    return tuple(LayerShape(*shape) for shape in zip(heads, kv_heads, ffn, strict=True))


def _whole_list(value: Any, length: int) -> list[int] | None:
    if isinstance(value, list) and len(value) == length and all(type(n) is int and n > 0 for n in value):
        return value
    return None


def _spread(value: Any, layers: int, key: str) -> list[float]:
    if value is None:
        return [1.0] * layers
    if isinstance(value, (int, float)):
        return [float(value)] * layers
    if isinstance(value, list) and len(value) == layers:
        return [float(factor) for factor in value]
    if isinstance(value, list) and len(value) == 2 and layers > 1:
        first, last = float(value[0]), float(value[1])
        return [round(first + (last - first) * i / (layers - 1), 2) for i in range(layers)]
    raise CheckpointError(f"config.json: {key} is {value!r}; it must be one number, two, or one for each layer.")


def _make_divisible(value: float, divisor: int) -> int:
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
