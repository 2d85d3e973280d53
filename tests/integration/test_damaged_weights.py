"""A flipped bit in a shard stops its rank before it serves, and the report names the file."""

import json

import pytest
import torch
from replica_harness import Replica
from safetensors.torch import save_file

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.manifest import write_manifest
from cluster.checkpoint.tensors import expected_tensors
from cluster.v1 import control_pb2

pytestmark = pytest.mark.integration

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300,
    "max_position_embeddings": 256, "torch_dtype": "float32", "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({tensor.name: torch.zeros(tensor.shape) for tensor in expected_tensors(model_spec(CONFIG))}, file)
    write_manifest(tmp_path, (file,), lambda done, total: None, chunk_bytes=65536)
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4  # still a number, and no one would see it in the text
    file.write_bytes(content)
    return tmp_path


def test_the_rank_fails_with_the_file_s_name(folder):
    with Replica(folder, folder) as replica:
        replica.control.wait_for(
            lambda latest: any(report.phase == control_pb2.RANK_PHASE_FAILED for report in latest.values())
        )
        failure = replica.control.latest[0].failure
        assert failure.startswith(f"CheckpointError: {folder / 'model.safetensors'} is damaged: bytes "), failure
        assert replica.control.latest[0].needs_change
        assert control_pb2.RANK_PHASE_READY not in replica.control.phases[0]
        replica.processes[0].wait(60)
