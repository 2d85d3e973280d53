"""config.json: old and new spellings, defaults of absent fields, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.checkpoint.config_json import model_spec
from cluster.domain.errors import CheckpointError, ConfigError, UnsupportedModelError
from cluster.domain.model_spec import Dtype

LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 6}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "gemma", "phi3"])
@pytest.mark.integration  # imports transformers
def test_absent_fields_default_as_in_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type)
    ours = model_spec({"model_type": model_type})
    assert (ours.hidden_size, ours.num_layers, ours.vocab_size) == (
        theirs.hidden_size, theirs.num_hidden_layers, theirs.vocab_size,
    )  # fmt: skip
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.ffn_size == theirs.intermediate_size
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    eos = theirs.eos_token_id
    assert ours.end_token_ids == ((eos,) if isinstance(eos, int) else ())


def test_null_kv_heads_mean_as_many_as_heads() -> None:
    assert model_spec(LLAMA | {"num_attention_heads": 8, "num_key_value_heads": None}).num_kv_heads == 8


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, Dtype.FLOAT16),
        ({"dtype": "bfloat16"}, Dtype.BFLOAT16),
        ({"dtype": "float32", "torch_dtype": "float16"}, Dtype.FLOAT32),
        ({}, Dtype.FLOAT32),
    ],
)
def test_dtype_has_two_names(config: dict[str, Any], dtype: Dtype) -> None:
    assert model_spec(LLAMA | config).dtype is dtype


def test_without_a_dtype_the_stored_one_counts() -> None:
    assert model_spec(LLAMA, stored_dtype=Dtype.BFLOAT16).dtype is Dtype.BFLOAT16


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 4096),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 2048),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "max_position_embeddings": 131072}, 131072),
        ({"rope_scaling": None}, 2048),
    ],
)
def test_rope_scaling_stretches_the_context(config: dict[str, Any], length: int) -> None:
    assert model_spec(LLAMA | config).max_model_len == length


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [5, 6]}, {}, (5, 6)),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({"eos_token_id": 2}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": None}, None, ()),
        ({}, None, (2,)),
    ],
)
def test_end_tokens(config: dict[str, Any], generation: dict[str, Any] | None, ids: tuple[int, ...]) -> None:
    assert model_spec(LLAMA | config, generation).end_token_ids == ids


def test_qwen2_has_biases_by_class_and_a_window_only_when_told() -> None:
    plain = model_spec(QWEN2 | {"sliding_window": 128})
    assert plain.attention_bias
    assert not plain.output_bias
    assert plain.sliding_window is None
    window = model_spec(QWEN2 | {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 4})
    assert window.sliding_window == 128
    assert window.sliding_layers == (False,) * 4 + (True,) * 2
    types = ["sliding_attention", "full_attention"] * 3
    listed = model_spec(QWEN2 | {"sliding_window": 128, "use_sliding_window": True, "layer_types": types})
    assert listed.sliding_layers == (True, False) * 3


def test_mistral_without_a_window() -> None:
    assert model_spec({"model_type": "mistral", "sliding_window": None}).sliding_window is None
    assert model_spec({"model_type": "mistral", "sliding_window": 99}).sliding_window == 99


def test_an_explicit_head_dim_wins() -> None:
    assert model_spec(LLAMA | {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 20}).head_dim == 20


def test_falcon_7b_has_one_kv_head_whatever_its_config_says() -> None:
    spec = model_spec({"architectures": ["RWForCausalLM"], "model_type": "RefinedWebModel", "num_kv_heads": 71})
    assert (spec.num_heads, spec.num_kv_heads, spec.layer_norms) == (71, 1, 1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["BertModel"], "model_type": "bert"}, "BertModel is not supported"),
        ({"model_type": "nobody"}, "nobody is not supported"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "recurrent state"),
        ({"architectures": ["BartForCausalLM"], "model_type": "bart", "is_encoder_decoder": True}, "has an encoder"),
        ({"architectures": ["XForCausalLM"], "model_type": "x", "vision_config": {}}, "more than text"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "planned from the headers"),
    ],
)
def test_what_is_known_not_to_work_is_one_sentence(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        model_spec(config)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": 4}, "must be a multiple"),
        ({"num_attention_heads": 7, "hidden_size": 96}, "add head_dim"),
        ({"dtype": "int8"}, "names the dtype 'int8'"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"quantization_config": {"quant_method": "fp8"}}, "Quantised"),
    ],
)
def test_bad_values_are_one_sentence(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model_spec(LLAMA | config)


def test_openelm_heads_must_divide() -> None:
    config = {"model_type": "openelm", "num_transformer_layers": 2, "num_query_heads": [4, 6], "num_kv_heads": [2, 4]}
    with pytest.raises(CheckpointError, match="num_query_heads"):
        model_spec(config)
