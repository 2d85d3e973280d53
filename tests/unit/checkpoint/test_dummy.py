"""A checkpoint that is a config.json."""

import json

import pytest

from cluster.checkpoint.dummy import dummy_checkpoint, tensor_key
from cluster.checkpoint.servable import check_servable
from cluster.domain.errors import CheckpointError, UnsupportedModelError


@pytest.fixture
def folder(tmp_path, files):
    (tmp_path / "config.json").write_text(json.dumps(files.TINY_LLAMA))
    return tmp_path


def test_the_config_says_which_tensors_there_are(folder):
    checkpoint = dummy_checkpoint(folder, 0)
    head = checkpoint.tensors["lm_head.weight"]
    assert (head.shape, head.dtype, head.nbytes) == ((40, 16), "BF16", 40 * 16 * 2)
    assert len({tensor.dummy_key for tensor in checkpoint.tensors.values()}) == len(checkpoint.tensors)
    assert checkpoint.total_bytes == sum(checkpoint.nbytes_by_name.values())
    assert checkpoint.files == ()
    check_servable(checkpoint)


def test_seed_and_config_decide_who_it_is(folder, files):
    first = dummy_checkpoint(folder, 0)
    assert dummy_checkpoint(folder, 0).digest == first.digest
    other = dummy_checkpoint(folder, 1)
    assert other.digest != first.digest
    assert other.tensors["lm_head.weight"].dummy_key != first.tensors["lm_head.weight"].dummy_key
    (folder / "model.safetensors").write_bytes(b"not looked at")
    assert dummy_checkpoint(folder, 0).digest == first.digest
    (folder / "config.json").write_text(json.dumps(files.TINY_LLAMA | {"rope_theta": 1000.0}))
    assert dummy_checkpoint(folder, 0).digest != first.digest


def test_keys_stay_what_they_are():
    assert tensor_key(0, "lm_head.weight") == 0xFD90F62B2F294449


def test_what_is_no_model_is_refused(folder, files):
    with pytest.raises(CheckpointError, match="is not a directory"):
        dummy_checkpoint(folder / "config.json", 0)
    (folder / "config.json").write_text(json.dumps(files.TINY_LLAMA | {"model_type": "martian", "auto_map": {}}))
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        dummy_checkpoint(folder, 0)
