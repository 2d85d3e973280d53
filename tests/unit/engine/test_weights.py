"""Slices from files: what arrives is what safetensors would give, cut and converted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.checkpoint.headers import read_header
from cluster.domain.errors import CheckpointError
from cluster.engine.model import weights
from cluster.engine.model.tensor_parallel import WHOLE, Shard


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    return {
        "matrix": torch.randn(37, 53, generator=generator),
        "vector": torch.randn(29, generator=generator),
        "half": torch.randn(11, 8, generator=generator).bfloat16(),
    }


@pytest.fixture
def headers(tmp_path, tensors):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    return {header.name: header for header in read_header(file).tensors}


def read(header, shape, shard=WHOLE, dtype=torch.float32):
    target = torch.full(shape, torch.nan, dtype=dtype)
    delivered = []
    reads = [weights.ShardRead(target, header, shard)]
    weights.load(reads, delivered.append)
    assert sum(delivered) == weights.bytes_to_read(reads)
    return target


@pytest.mark.parametrize("staging", [64, 1000, weights.STAGING_BYTES])
def test_whole_rows_and_strips(headers, tensors, staging, monkeypatch):
    monkeypatch.setattr(weights, "STAGING_BYTES", staging)  # smaller than a row, than a tensor, than nothing
    matrix = tensors["matrix"]
    assert torch.equal(read(headers["matrix"], (37, 53)), matrix)
    assert torch.equal(read(headers["matrix"], (9, 53), Shard(0, ((5, 14),))), matrix[5:14])
    assert torch.equal(read(headers["matrix"], (37, 7), Shard(1, ((40, 47),))), matrix[:, 40:47])
    pieces = Shard(0, ((0, 3), (10, 12), (30, 37)))
    assert torch.equal(read(headers["matrix"], (12, 53), pieces), torch.cat([matrix[:3], matrix[10:12], matrix[30:]]))
    columns = Shard(1, ((0, 2), (50, 53)))
    assert torch.equal(read(headers["matrix"], (37, 5), columns), torch.cat([matrix[:, :2], matrix[:, 50:]], 1))


def test_vectors_and_empty_shards(headers, tensors):
    assert torch.equal(read(headers["vector"], (29,)), tensors["vector"])
    assert torch.equal(read(headers["vector"], (4,), Shard(0, ((25, 29),))), tensors["vector"][25:])
    assert read(headers["matrix"], (0, 53), Shard(0, ((37, 37),))).shape == (0, 53)


def test_element_types_are_converted_while_streaming(headers, tensors):
    assert torch.equal(read(headers["half"], (11, 8)), tensors["half"].float())
    assert torch.equal(read(headers["matrix"], (37, 53), dtype=torch.bfloat16), tensors["matrix"].bfloat16())


def test_a_file_that_shrank_is_named(headers, tmp_path):
    file: Path = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    last = max(headers.values(), key=lambda header: header.offset)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends in the middle of"):
        read(last, last.shape)


def test_a_missing_tensor_is_named(headers):
    with pytest.raises(CheckpointError, match="lacks the tensor nobody"):
        weights.require(headers, "nobody")
    assert weights.require(headers, "nobody", "vector").name == "vector"
