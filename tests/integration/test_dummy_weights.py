"""Weights out of nothing: a config.json is enough, and every layout computes the same tokens."""

import json

import pytest
from replica_harness import Replica, Session, submit

pytestmark = pytest.mark.integration

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300,
    "max_position_embeddings": 256, "torch_dtype": "float32", "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def tokens_of(folder, logs, seed, tp):
    logs.mkdir()
    with Replica(folder, logs, tp=tp, load_format="dummy", seed=seed) as replica:
        replica.wait_ready()
        with replica.channel() as channel:
            session = Session(replica.stub(channel))
            session.submit(submit(1, [5, 6, 7], 16), submit(2, list(range(10, 40)), 16))
            tokens, _ = session.collect([1, 2])
            session.close()
    return tokens


def test_layouts_agree_and_seeds_do_not(folder):
    alone = tokens_of(folder, folder / "a", seed=0, tp=1)
    assert tokens_of(folder, folder / "b", seed=0, tp=2) == alone
    assert tokens_of(folder, folder / "c", seed=1, tp=1) != alone
    assert all(len(set(found)) > 4 for found in alone.values())
