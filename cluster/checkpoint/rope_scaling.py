"""Rope types of a config.json: the context they give, whether they depend on length, and a stretch from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.checkpoint.fields import Fields
from cluster.checkpoint.layout import Checkpoint
from cluster.domain.errors import ConfigError
from cluster.domain.model_spec import RopeByLength

# Types whose factor is already part of max_position_embeddings.
_FACTOR_IN_CONTEXT = frozenset({"default", "llama3", "longrope", "su", "mrope", "proportional"})
# Models whose published length has every factor in it.
_SCALED_ALREADY = ("gemma3", "gemma4")
# Whose generate computes a sequence anew when it passes the original length (transformers' model classes).
_SWITCHING = frozenset({"phi3", "phimoe", "phi4_multimodal"})
# Phi3Config has this length of its own where config.json names none, and it wins over the one in its rope parameters.
_OWN_ORIGINAL = {"phi3": 4096, "phi4_multimodal": 4096}
# Names that these models give longrope.
_LONGROPE_NAMES = frozenset({"longrope", "su", "yarn"})
# Positions of another kind than rotary ones.
_WITHOUT_ROPE = frozenset({"bloom", "biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "mpt", "opt", "xglm"})
# Rotary ones of the model's own code, which takes no such parameters, or whose own cannot be replaced.
_OWN_ROPE = frozenset({"codegen", "gptj", "openelm", "phi3small", "phimoe"})


def ropes(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The rope parameters of a config: one set, or one for each layer type; none when it names none."""
    rope = Fields(config).rope()
    nested = tuple(value for value in rope.values() if isinstance(value, Mapping))
    return nested or ((rope,) if rope else ())


def rope_type(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Any:
    """The name that transformers gives the type, which some models' configs call otherwise."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if config.get("model_type") == "phi3small":
        return "longrope" if kind == "su" or (kind == "default" and "short_factor" in rope) else kind
    return "longrope" if config.get("model_type") in _SWITCHING and kind in _LONGROPE_NAMES else kind


def scaled_context(config: Mapping[str, Any], context: int) -> int | None:
    """Linear, dynamic and yarn scaling stretch the context by their factor, yarn from the original length.

    None: the context is ``context``. Where layer types differ, the published length is the whole one.
    """
    found = ropes(config)
    if len(found) != 1 or str(config.get("model_type", "")).startswith(_SCALED_ALREADY):
        return None
    rope = found[0]
    kind, factor = rope_type(config, rope), rope.get("factor", 1.0)
    if kind in _FACTOR_IN_CONTEXT or not isinstance(factor, (int, float)) or factor <= 0:
        return None
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings", context)
        return int(original * factor) if isinstance(original, int) else None
    return int(context * factor)


def rope_by_length(config: Mapping[str, Any], context: int) -> RopeByLength | None:
    """Whether frequencies depend on a sequence's length; ``context``: max_position_embeddings."""
    found = {rope_type(config, rope): rope for rope in ropes(config)}
    lengths = []
    if "dynamic" in found:
        lengths.append(context)
    if "longrope" in found:
        lengths.append(_original_len(config, found["longrope"], context))
    if not lengths:
        return None
    switching = config.get("model_type") in _SWITCHING and "longrope" in found
    return RopeByLength("switch" if switching else "dynamic", min(lengths))


def _original_len(config: Mapping[str, Any], rope: Mapping[str, Any], context: int) -> int:
    own = config.get("original_max_position_embeddings", _OWN_ORIGINAL.get(str(config.get("model_type"))))
    original = own if own is not None else rope.get("original_max_position_embeddings", context)
    return original if type(original) is int and original > 0 else context


def stretched(checkpoint: Checkpoint, scaling: str | None) -> Checkpoint:
    """``checkpoint`` as ``--rope-scaling`` wants it; ConfigError when this model cannot be stretched so."""
    return checkpoint if scaling is None else replace(checkpoint, config=stretched_config(checkpoint.config, scaling))


def stretched_config(config: Mapping[str, Any], scaling: str | None) -> dict[str, Any]:
    """``config`` with the rope parameters of ``scaling``, which ``canonical_rope_scaling`` wrote.

    llama3 and longrope get a longer max_position_embeddings too, as their published configs have it.
    """
    if scaling is None:
        return dict(config)
    asked: dict[str, Any] = json.loads(scaling)
    kind, model_type = asked["rope_type"], str(config.get("model_type", ""))
    _check_stretchable(config, kind)
    new = {key: value for key, value in config.items() if key != "rope_scaling"}
    if kind not in {"linear", "dynamic"}:
        asked.setdefault("original_max_position_embeddings", _own_context(config, kind))
    if kind in {"llama3", "longrope"}:
        new["max_position_embeddings"] = int(asked["original_max_position_embeddings"] * asked["factor"])
    if kind == "longrope":
        _check_factor_counts(config, asked)
        if "original_max_position_embeddings" in config or model_type in _OWN_ORIGINAL:
            new["original_max_position_embeddings"] = asked["original_max_position_embeddings"]
    new["rope_parameters"] = {**Fields(config).rope(), **asked}
    new["rope_parameters"].pop("type", None)
    return new


def _own_context(config: Mapping[str, Any], kind: str) -> int:
    if "max_position_embeddings" not in config:
        raise ConfigError(
            f"--rope-scaling {kind}: config.json names no max_position_embeddings; give "
            "original_max_position_embeddings in the JSON object."
        )
    return Fields(config).whole("max_position_embeddings", 1)


def _check_stretchable(config: Mapping[str, Any], kind: str) -> None:
    model_type = str(config.get("model_type", ""))
    if model_type in _WITHOUT_ROPE or (
        model_type in {"falcon", "RefinedWeb", "RefinedWebModel"} and config.get("alibi")
    ):
        raise ConfigError(f"--rope-scaling {kind}: {model_type} has no rotary positions to stretch; leave it out.")
    if model_type in _OWN_ROPE:
        raise ConfigError(
            f"--rope-scaling {kind}: {model_type}'s rotary positions are fixed in its code; leave it out."
        )
    if model_type in _SWITCHING and kind != "longrope":
        raise ConfigError(f"--rope-scaling {kind}: {model_type} can be stretched with longrope only.")
    if len(ropes(config)) > 1:
        raise ConfigError(
            f"--rope-scaling {kind}: this model's layers have their own rope parameters; write them into config.json."
        )
    for rope in ropes(config):
        own = rope_type(config, rope)
        if own != "default":
            raise ConfigError(
                f"--rope-scaling {kind}: the checkpoint's positions are stretched already ({own}); leave it out, or "
                "delete rope_scaling in its config.json."
            )


def _check_factor_counts(config: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    fields = Fields(config)
    if fields.get("hidden_size") is None or fields.get("num_attention_heads") is None:
        return
    head_dim = fields.head_dim(fields.whole("hidden_size", 1), fields.whole("num_attention_heads", 1), None)
    share = fields.rope().get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    wanted = int(head_dim * (share if isinstance(share, (int, float)) else 1.0)) // 2
    if len(asked["short_factor"]) != wanted:
        raise ConfigError(
            f"--rope-scaling longrope: short_factor and long_factor have {len(asked['short_factor'])} numbers; this "
            f"model has {wanted} rotary frequencies."
        )
