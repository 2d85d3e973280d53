"""The context and the lengths of rope types, and a stretch from outside, against transformers' own configs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from cluster.checkpoint.rope_scaling import rope_by_length, scaled_context, stretched_config
from cluster.domain.errors import ConfigError
from cluster.domain.model_spec import RopeByLength
from cluster.domain.rope_scaling import canonical_rope_scaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4,
    "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 4096,
}  # fmt: skip
PHI3 = LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONG = {"rope_type": "longrope", "factor": 4.0, **FACTORS}


def stretch(config: dict[str, Any], value: Any) -> dict[str, Any]:
    return stretched_config(config, canonical_rope_scaling(value))


def context(config: dict[str, Any]) -> int:
    length = config["max_position_embeddings"]
    return scaled_context(config, length) or length


@pytest.mark.parametrize(
    ("value", "length"),
    [("linear:2", 8192), ("dynamic:2", 8192), ("yarn:4", 16384), ("llama3:8", 32768), (LONG, 16384),
     ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096)],
)  # fmt: skip
def test_a_stretched_model_has_its_factor_more_context(value: Any, length: int) -> None:
    assert context(stretch(LLAMA, value)) == length


@pytest.mark.parametrize("value", ["linear:2", "dynamic:2", "yarn:4", "llama3:8", LONG])
@pytest.mark.parametrize("own", [{}, {"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
                                 {"rope_scaling": None, "rope_theta": 500.0}])  # fmt: skip
def test_transformers_reads_the_stretched_config_as_meant(value: Any, own: dict[str, Any]) -> None:
    config = stretch(LLAMA | own, value)
    read = CONFIG_MAPPING["llama"].from_dict(config).rope_parameters
    assert read["rope_theta"] == (500.0 if own else 10_000.0)
    for name, number in json.loads(canonical_rope_scaling(value)).items():
        assert read[name] == number
    if read["rope_type"] in {"yarn", "llama3", "longrope"}:
        assert read["original_max_position_embeddings"] == 4096


def test_partial_rotary_models_keep_their_share() -> None:
    config = LLAMA | {"model_type": "stablelm", "partial_rotary_factor": 0.5}
    read = CONFIG_MAPPING["stablelm"].from_dict(stretch(config, "linear:4")).rope_parameters
    assert (read["rope_type"], read["factor"], read["partial_rotary_factor"]) == ("linear", 4.0, 0.5)


def test_nothing_asked_changes_nothing() -> None:
    config = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert stretched_config(config, None) == config


@pytest.mark.parametrize(
    ("config", "value", "says"),
    [
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "dynamic:2", "stretched already \\(linear\\)"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn:4", "stretched already \\(yarn\\)"),
        (PHI3, "linear:2", "with longrope only"),
        ({"model_type": "llama"}, "yarn:2", "names no max_position_embeddings"),
        (LLAMA | {"model_type": "mpt"}, "linear:2", "mpt has no rotary positions"),
        (LLAMA | {"model_type": "openelm"}, "linear:2", "openelm's rotary positions are fixed"),
        (LLAMA | {"model_type": "phi3small"}, "yarn:2", "phi3small's rotary positions are fixed"),
        (LLAMA | {"model_type": "falcon", "alibi": True}, "linear:2", "falcon has no rotary positions"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}},
         "linear:2", "layers have their own"),
        (LLAMA, LONG | {"short_factor": [1.0], "long_factor": [1.0]}, "have 1 numbers; this model has 4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused_in_a_sentence(config: dict[str, Any], value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        stretch(config, value)
    assert str(caught.value).startswith("--rope-scaling ")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LLAMA, None),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, RopeByLength("dynamic", 4096)),
        (LLAMA | {"rope_scaling": LONG | {"original_max_position_embeddings": 1024}}, RopeByLength("dynamic", 1024)),
        (LLAMA | {"rope_scaling": LONG}, RopeByLength("dynamic", 4096)),
        (PHI3 | {"rope_scaling": LONG, "original_max_position_embeddings": 1024}, RopeByLength("switch", 1024)),
        # Phi3Config's own default wins over what stands in the rope parameters.
        (PHI3 | {"rope_scaling": LONG | {"original_max_position_embeddings": 1024}}, RopeByLength("switch", 4096)),
        (PHI3 | {"rope_scaling": {"type": "su", **FACTORS}}, RopeByLength("switch", 4096)),
        (PHI3 | {"rope_scaling": None}, None),
    ],
)
def test_which_types_follow_the_length(config: dict[str, Any], found: RopeByLength | None) -> None:
    assert rope_by_length(config, config["max_position_embeddings"]) == found


def test_layer_types_of_their_own_are_looked_at_one_by_one() -> None:
    kinds = {"full_attention": {"rope_type": "dynamic", "factor": 4.0}, "sliding_attention": {"rope_type": "default"}}
    config = LLAMA | {"model_type": "gemma3_text", "rope_parameters": kinds}
    assert rope_by_length(config, 4096) == RopeByLength("dynamic", 4096)
    assert scaled_context(config, 4096) is None


def test_gemma3_publishes_its_whole_length() -> None:
    config = LLAMA | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert scaled_context(config, 131072) is None
