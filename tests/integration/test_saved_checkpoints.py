"""Checkpoints as transformers itself saves them: read, validated, planned; the ledger equals the bytes on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.validate import check_tensors, stored_dtype
from cluster.config.schema import ModelConfig
from cluster.domain.hardware import cpu_device, uniform_inventory
from cluster.domain.model_spec import Dtype
from cluster.domain.quantities import GIB
from cluster.planner.plan import plan

pytestmark = pytest.mark.integration

_SIZES: dict[str, Any] = {
    "vocab_size": 311, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 128, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 20, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ],
)
@pytest.mark.parametrize("shard_size", ["50KB", "5GB"])
def test_a_saved_model_is_read_checked_and_planned(
    tmp_path: Path, model_type: str, changes: dict[str, Any], shard_size: str
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(_SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)

    checkpoint = read_checkpoint(tmp_path)
    assert (len(checkpoint.files) > 1) == (shard_size == "50KB")
    assert stored_dtype(checkpoint) is Dtype.BFLOAT16
    spec = model_spec(checkpoint.config, checkpoint.generation_config)
    check_tensors(checkpoint, spec)
    assert spec.dtype is Dtype.BFLOAT16
    assert spec.end_token_ids == (2,)
    assert spec.sliding_window == getattr(model.config, "sliding_window", None)
    if spec.sliding_window is not None and model_type == "qwen2":
        assert spec.sliding_layers == tuple(kind == "sliding_attention" for kind in model.config.layer_types)
    assert sum(p.numel() for p in model.parameters()) * 2 == checkpoint.total_bytes

    found = plan(
        spec, ModelConfig(model=str(tmp_path), tensor_parallel_size=1), uniform_inventory(1, 1, cpu_device(4 * GIB)),
        weights_nbytes_by_name=checkpoint.nbytes_by_name,
    )  # fmt: skip
    assert found.ledgers[0].weight_bytes == 2 * checkpoint.total_bytes  # float32 on CPU
    assert found.ledgers[0].read_bytes == checkpoint.total_bytes
