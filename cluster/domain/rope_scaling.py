"""``--rope-scaling``: how a model's rotary positions are stretched to a longer context than it was trained with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

# Type -> fields it takes besides rope_type, factor, rope_theta and original_max_position_embeddings.
_FIELDS: dict[str, frozenset[str]] = {
    "linear": frozenset(),
    "dynamic": frozenset(),
    "llama3": frozenset({"low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"short_factor", "long_factor", "attention_factor"}),
}
# These stretch from the model's own length, whatever it is.
_WITHOUT_ORIGINAL = frozenset({"linear", "dynamic"})
_LISTS = frozenset({"short_factor", "long_factor"})
# What Llama 3.1 to 3.3 were published with.
_LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def canonical_rope_scaling(value: str | Mapping[str, Any]) -> str:
    """JSON with sorted keys of ``TYPE:FACTOR``, of a JSON object, or of a mapping; equal for what means the same.

    ValueError with one sentence for everything that no model could use.
    """
    scaling = dict(_parsed(value) if isinstance(value, str) else value)
    old_name = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", old_name)
    if kind not in _FIELDS:
        raise ValueError(f"rope_type is {kind!r}; it must be one of {', '.join(sorted(_FIELDS))}")
    _check_names(kind, scaling)
    for name, number in scaling.items():
        if name not in {"rope_type", "truncate"}:
            scaling[name] = _checked(name, number)
    _check_factor(kind, scaling)
    if kind == "llama3":
        scaling = _LLAMA3_DEFAULTS | scaling
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise ValueError("high_freq_factor must be more than low_freq_factor")
    if kind == "longrope" and len(scaling["short_factor"]) != len(scaling["long_factor"]):
        raise ValueError("short_factor and long_factor must have one number for each rotary frequency, both alike")
    return json.dumps(scaling, sort_keys=True)


def _parsed(text: str) -> Mapping[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError:
            raise ValueError(f"{text!r} is no JSON object; write one, or TYPE:FACTOR such as linear:2") from None
        assert isinstance(value, dict), value
        return value
    kind, colon, factor = text.partition(":")
    try:
        return {"rope_type": kind.strip(), "factor": float(factor)} if colon else {"rope_type": kind.strip()}
    except ValueError:
        raise ValueError(f"{factor!r} is no factor; write TYPE:FACTOR such as linear:2, or a JSON object") from None


def _check_names(kind: str, scaling: Mapping[str, Any]) -> None:
    known = _FIELDS[kind] | {"rope_type", "factor", "rope_theta"}
    if kind not in _WITHOUT_ORIGINAL:
        known |= {"original_max_position_embeddings"}
    for name in scaling:
        if name not in known:
            raise ValueError(f"{name} is no field of rope_type {kind}, which takes {', '.join(sorted(known))}")
    for name in sorted(_LISTS & known):
        if name not in scaling:
            raise ValueError("longrope needs short_factor and long_factor, one number for each rotary frequency")


def _check_factor(kind: str, scaling: Mapping[str, Any]) -> None:
    if "factor" not in scaling:
        raise ValueError(f"rope_type {kind} needs a factor, how many times longer the context becomes")
    if scaling["factor"] <= 1.0:
        raise ValueError(f"factor is {scaling['factor']:g}; it must be more than 1, since it stretches the context")


def _checked(name: str, value: Any) -> Any:
    if name in _LISTS:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name} is {value!r}; it must be a list of numbers")
        return [_number(name, item) for item in value]
    if name == "original_max_position_embeddings":
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of tokens")
        return value
    return _number(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} is {value!r}; it must be a number above 0")
    return float(value)
