"""Checkpoint directories: whole ones, and every file that can be missing or wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.layout import IN_OUR_TREE, INDEX_FILE, read_checkpoint
from cluster.checkpoint.transformers_types import CLASS_BY_MODEL_TYPE
from cluster.checkpoint.validate import check_tensors, stored_dtype
from cluster.domain.errors import CheckpointError, UnsupportedModelError
from cluster.domain.model_spec import Dtype

Tiny = Callable[..., Path]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_whole_checkpoint_is_read(tiny: Tiny, count: int) -> None:
    path = tiny(files_count=count)
    (path / "tokenizer.json").write_text("{}")
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    checkpoint = read_checkpoint(path)
    spec = model_spec(checkpoint.config, checkpoint.generation_config)
    check_tensors(checkpoint, spec)
    assert len(checkpoint.files) == count
    assert checkpoint.total_bytes == sum(checkpoint.nbytes_by_name.values())
    assert [file.name for file in checkpoint.tokenizer_files] == ["tokenizer.json"]
    assert all(tensor.file in checkpoint.files for tensor in checkpoint.tensors.values())
    assert spec.end_token_ids == (2, 3)
    assert stored_dtype(checkpoint) is Dtype.BFLOAT16


def test_the_digest_follows_shape_config_and_text_but_not_place(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny(files_count=2)
    (path / "tokenizer.json").write_text("{}")
    first = read_checkpoint(path).digest
    moved = path.rename(tmp_path / "elsewhere")
    assert read_checkpoint(moved).digest == first
    (moved / "tokenizer.json").write_text("[]")
    changed = read_checkpoint(moved).digest
    assert changed != first
    (moved / "generation_config.json").write_text("{}")
    assert read_checkpoint(moved).digest not in (first, changed)


def test_a_shard_that_is_missing_is_named(tiny: Tiny) -> None:
    path = tiny(files_count=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors, which is not there"):
        read_checkpoint(path)


def test_a_tensor_that_its_shard_lacks_is_named(tiny: Tiny) -> None:
    path = tiny(files_count=2)
    index = json.loads((path / INDEX_FILE).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-00002-of-00002.safetensors"
    (path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks it \(it is in model-00001-of-00002.safetensors\)"):
        read_checkpoint(path)
    index["weight_map"]["ghost"] = "model-00002-of-00002.safetensors"
    del index["weight_map"][name]
    (path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="ghost"):
        read_checkpoint(path)


def test_an_index_never_reaches_outside_its_directory(tiny: Tiny) -> None:
    path = tiny(files_count=2)
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="no safetensors file there"):
        read_checkpoint(path)


def _only_pickles(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _no_index(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")


def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


def _bad_config(path: Path) -> None:
    (path / "config.json").write_text("{,")


def _list_config(path: Path) -> None:
    (path / "config.json").write_text("[]")


def _truncated(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-10])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_only_pickles, "convert them to safetensors"),
        (_no_weights, "has no weights"),
        (_no_index, "but no model.safetensors.index.json"),
        (_no_config, "has no config.json"),
        (_bad_config, "not valid JSON"),
        (_list_config, "not a JSON object"),
        (_truncated, "truncated"),
    ],
)
def test_damage_is_one_sentence(tiny: Tiny, damage: Callable[[Path], None], says: str) -> None:
    path = tiny()
    damage(path)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_checkpoint(tmp_path / "none")


def test_custom_code_is_refused(tiny: Tiny) -> None:
    path = tiny(config={"model_type": "martian", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    with pytest.raises(UnsupportedModelError, match="never run here"):
        read_checkpoint(path)


def test_code_beside_what_transformers_has_is_passed_over(tiny: Tiny) -> None:
    path = tiny(config={"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    assert read_checkpoint(path).config["model_type"] == "llama"


@pytest.mark.integration
def test_what_transformers_has_is_listed() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == CLASS_BY_MODEL_TYPE
    assert not CLASS_BY_MODEL_TYPE.keys() & IN_OUR_TREE


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \[8, 16\].*\[16, 16\]; check num_key_value_heads"),
        ({"intermediate_size": 32}, "check intermediate_size"),
        ({"vocab_size": 41}, "embed_tokens.*check vocab_size"),
        ({"hidden_size": 20}, "check hidden_size"),
        ({"num_hidden_layers": 3}, "holds 2 decoder layers, config.json implies 3"),
        ({"num_hidden_layers": 1}, "holds 2 decoder layers, but config.json implies 1"),
        ({"attention_bias": True}, "check attention_bias"),
    ],
)
def test_a_config_that_contradicts_the_tensors(tiny: Tiny, config: dict[str, Any], says: str) -> None:
    checkpoint = read_checkpoint(tiny(config=config))
    with pytest.raises(CheckpointError, match=says):
        check_tensors(checkpoint, model_spec(checkpoint.config))


def test_a_tied_checkpoint_may_lack_its_head(tiny: Tiny) -> None:
    checkpoint = read_checkpoint(tiny(config={"tie_word_embeddings": True}, drop=("lm_head.weight",)))
    check_tensors(checkpoint, model_spec(checkpoint.config))


def test_an_untied_checkpoint_may_not(tiny: Tiny) -> None:
    checkpoint = read_checkpoint(tiny(drop=("lm_head.weight",)))
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to true"):
        check_tensors(checkpoint, model_spec(checkpoint.config))


def test_rotary_frequencies_of_old_exports_are_ignored(tiny: Tiny) -> None:
    checkpoint = read_checkpoint(tiny(extra={"model.layers.0.self_attn.rotary_emb.inv_freq": (2,), "other": (3,)}))
    check_tensors(checkpoint, model_spec(checkpoint.config))
