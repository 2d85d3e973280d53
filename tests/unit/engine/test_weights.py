"""Slices from files: what arrives is what safetensors would give, cut and converted."""

import json
import random
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.checkpoint.headers import TensorHeader, read_header
from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.manifest import write_manifest
from cluster.domain.errors import CheckpointError
from cluster.engine.model import dummy_weights, weights, windows
from cluster.engine.model.shards import WHOLE, Shard

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    return {
        "matrix": torch.randn(37, 53, generator=generator),
        "vector": torch.randn(29, generator=generator),
        "half": torch.randn(11, 8, generator=generator).bfloat16(),
        "experts": torch.randn(3, 10, 7, generator=generator),
    }


@pytest.fixture
def headers(tmp_path, tensors):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    return {header.name: header for header in read_header(file).tensors}


@pytest.fixture(params=[64, 1000, windows.WINDOW_BYTES])  # shorter than a row, than a tensor, longer than the file
def window(request, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_BYTES", request.param)


def load(reads):
    delivered = []
    weights.load(reads, delivered.append)
    assert sum(delivered) == weights.bytes_to_read(reads)


def read(header, shape, shard=WHOLE, dtype=torch.float32):
    target = torch.full(shape, torch.nan, dtype=dtype)
    load([weights.ShardRead(target, header, shard)])
    return target


def cut(tensor, shard):
    """What a shard means, in torch's words."""
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    if shard.rows is not None:
        matrix = torch.cat([matrix[start:stop] for start, stop in shard.rows])
    if shard.columns is not None:
        matrix = torch.cat([matrix[:, start:stop] for start, stop in shard.columns], 1)
    return matrix if tensor.dim() > 1 else matrix[:, 0]


@pytest.mark.usefixtures("window")
def test_whole_rows_and_strips(headers, tensors):
    matrix = tensors["matrix"]
    assert torch.equal(read(headers["matrix"], (37, 53)), matrix)
    assert torch.equal(read(headers["matrix"], (9, 53), Shard(rows=((5, 14),))), matrix[5:14])
    assert torch.equal(read(headers["matrix"], (37, 7), Shard(columns=((40, 47),))), matrix[:, 40:47])
    pieces = Shard(rows=((0, 3), (10, 12), (30, 37)))
    assert torch.equal(read(headers["matrix"], (12, 53), pieces), torch.cat([matrix[:3], matrix[10:12], matrix[30:]]))
    columns = Shard(columns=((0, 2), (50, 53)))
    assert torch.equal(read(headers["matrix"], (37, 5), columns), torch.cat([matrix[:, :2], matrix[:, 50:]], 1))


@pytest.mark.usefixtures("window")
def test_vectors_and_empty_shards(headers, tensors):
    assert torch.equal(read(headers["vector"], (29,)), tensors["vector"])
    assert torch.equal(read(headers["vector"], (4,), Shard(rows=((25, 29),))), tensors["vector"][25:])
    assert read(headers["matrix"], (0, 53), Shard(rows=((37, 37),))).shape == (0, 53)
    assert read(headers["matrix"], (37, 0), Shard(columns=((5, 5),))).shape == (37, 0)
    load([])


@pytest.mark.usefixtures("window")
def test_a_cube_is_a_matrix(headers, tensors):
    experts = tensors["experts"]
    assert torch.equal(read(headers["experts"], (3, 10, 7)), experts)
    assert torch.equal(read(headers["experts"], (3, 4, 7), Shard(((3, 7), (13, 17), (23, 27)))), experts[:, 3:7])
    assert torch.equal(read(headers["experts"], (3, 10, 2), Shard(columns=((5, 7),))), experts[:, :, 5:])
    assert torch.equal(read(headers["experts"], (4, 2), Shard(((13, 17),), ((5, 7),))), experts[1, 3:7, 5:])


@pytest.mark.usefixtures("window")
def test_targets_are_views(headers, tensors):
    """Experts merged into one parameter, a transposed parameter, every second element of a vector: several reads."""
    merged, turned, spread = torch.full((2, 40, 20), torch.nan), torch.full((53, 37), torch.nan), torch.zeros(29, 2)
    load([
        weights.ShardRead(merged[0, 1:38, 3:10], headers["matrix"], Shard(columns=((40, 47),))),
        weights.ShardRead(merged[1, :37, :], headers["matrix"], Shard(columns=((33, 53),))),
        weights.ShardRead(turned.t(), headers["matrix"], WHOLE),
        weights.ShardRead(spread[:, 1], headers["vector"], WHOLE),
    ])  # fmt: skip
    assert torch.equal(merged[0, 1:38, 3:10], tensors["matrix"][:, 40:47])
    assert torch.equal(merged[1, :37], tensors["matrix"][:, 33:])
    assert int(merged.isnan().sum()) == merged.numel() - 37 * 27
    assert torch.equal(turned, tensors["matrix"].t())
    assert torch.equal(spread, torch.stack([torch.zeros(29), tensors["vector"]], 1))


@pytest.mark.usefixtures("window")
def test_a_target_whose_dimensions_cannot_be_merged(headers, tensors):
    parameter = torch.full((2, 3, 9, 7), torch.nan)
    load(
        [
            weights.ShardRead(
                parameter[1, :, 2:6, :5], headers["experts"], Shard(((1, 5), (11, 15), (22, 26)), ((2, 7),))
            )
        ]
    )
    expected = torch.stack([tensors["experts"][i, first : first + 4, 2:] for i, first in enumerate((1, 1, 2))])
    assert torch.equal(parameter[1, :, 2:6, :5], expected)
    assert int(parameter.isnan().sum()) == parameter.numel() - 60


@pytest.mark.usefixtures("window")
def test_element_types_are_converted_while_streaming(headers, tensors):
    assert torch.equal(read(headers["half"], (11, 8)), tensors["half"].float())
    assert torch.equal(read(headers["matrix"], (37, 53), dtype=torch.bfloat16), tensors["matrix"].bfloat16())
    assert torch.equal(read(headers["half"], (11, 8), dtype=torch.float16), tensors["half"].half())


def misfit_file(folder, rng):
    """A file whose header has an odd length and whose tensors follow each other in any order: legal, never aligned."""
    content, entries, tensors = b"", {}, {}
    for i in range(rng.randrange(2, 7)):
        dtype = rng.choice(list(DTYPES))
        shape = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 4))]
        tensor = torch.randn(*shape).to(DTYPES[dtype])
        raw = bytes(tensor.view(torch.uint8).flatten().tolist())
        entries[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(raw)]}
        content += raw
        tensors[f"t{i}"] = tensor
    text = json.dumps(entries).encode() + b" " * rng.randrange(8)
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + content)
    (folder / "config.json").write_text("{}")
    return tensors


def pieces(rng, size):
    """Up to two ranges of ``size`` rows or columns, or all of them."""
    if rng.random() < 0.3:
        return None
    ends = sorted(rng.sample(range(size + 1), min(rng.choice([2, 4]), (size + 1) // 2 * 2)))
    return tuple(zip(ends[::2], ends[1::2], strict=True))


@pytest.mark.parametrize("manifest", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_file_any_cut(tmp_path, seed, manifest, monkeypatch):
    """Random shapes, types, offsets, cuts and windows, all tensors in one load."""
    rng = random.Random(seed)
    tensors = misfit_file(tmp_path, rng)
    monkeypatch.setattr(windows, "WINDOW_BYTES", rng.choice([8, 64, 200, 4096]))
    if manifest:
        write_manifest(tmp_path, (tmp_path / "model.safetensors",), lambda done, total: None, chunk_bytes=65536)
    headers = read_checkpoint(tmp_path).tensors
    assert all((header.digests is not None) == manifest for header in headers.values())
    wanted = []
    for name, tensor in tensors.items():
        rows = tensor.numel() // tensor.shape[-1] if tensor.dim() > 1 else tensor.numel()
        shard = Shard(pieces(rng, rows), pieces(rng, tensor.shape[-1]) if tensor.dim() > 1 else None)
        expected = cut(tensor, shard)
        target = torch.full(expected.shape, torch.nan, dtype=rng.choice([torch.float32, torch.float64]))
        wanted.append((weights.ShardRead(target, headers[name], shard), expected.to(target.dtype)))
    load([one for one, _ in wanted])
    for one, expected in wanted:
        assert torch.equal(one.target, expected), one


def test_every_byte_is_read_once(headers, monkeypatch):
    """Row-parallel strips of one matrix, a neighbour and a whole one: no window is read twice."""
    monkeypatch.setattr(windows, "WINDOW_BYTES", 256)
    wanted = [
        (headers["matrix"], windows.strip_of((37, 53), Shard(columns=((first, first + 10),)))) for first in (0, 20, 40)
    ]
    wanted.append((headers["vector"], windows.strip_of((29,), WHOLE)))
    planned = windows.plan_windows(wanted, [4] * 4)
    assert len({(w.source, w.start) for w in planned}) == len(planned)
    assert all(a.high <= b.low for a, b in pairwise(planned))
    assert sum(w.high - w.low for w in planned) == (37 * 53 + 29) * 4


def test_a_file_that_shrank_is_named(headers, tmp_path):
    file: Path = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    last = max(headers.values(), key=lambda header: header.offset)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte \d+, in the middle of its tensors"):
        read(last, last.shape)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be opened"):
        read(last, last.shape)


def test_a_flipped_bit_is_found_by_those_who_read_it(tmp_path):
    save_file({"a": torch.zeros(70_000), "b": torch.ones(70_000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, (tmp_path / "model.safetensors",), lambda done, total: None, chunk_bytes=65536)
    headers = read_checkpoint(tmp_path).tensors
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.seek(headers["b"].offset + headers["b"].nbytes - 1)
        stream.write(b"\x3e")
    assert torch.equal(read(headers["a"], (70_000,)), torch.zeros(70_000))
    assert torch.equal(read(headers["b"], (10,), Shard(rows=((0, 10),))), torch.ones(10))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is damaged: bytes 524288 to \d+ do not have the sha256"
    ):
        read(headers["b"], (70_000,))


def test_an_unknown_element_type_is_named(headers):
    with pytest.raises(CheckpointError, match=r"matrix in .* has the element type F8_E4M3"):
        read(replace(headers["matrix"], dtype="F8_E4M3"), (37, 53))


def test_a_missing_tensor_is_named(headers):
    with pytest.raises(CheckpointError, match="lacks the tensor nobody"):
        weights.require(headers, "nobody")
    assert weights.require(headers, "nobody", "vector").name == "vector"


def dummy(shape, dtype="F32", key=7, name="x.weight"):
    return TensorHeader(name, dtype, shape, Path("nowhere"), 0, 0, dummy_key=key)


@pytest.mark.parametrize("window_bytes", [1000, windows.WINDOW_BYTES])
def test_dummy_values_depend_on_key_and_index_alone(window_bytes, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_BYTES", window_bytes)
    shape = (140, 500)  # more elements than one block of the generator
    whole = read(dummy(shape), shape)
    rows, columns = Shard(((10, 20), (31, 140))), Shard(columns=((3, 77), (400, 500)))
    assert torch.equal(read(dummy(shape), (119, 500), rows), cut(whole, rows))
    assert torch.equal(read(dummy(shape), (140, 174), columns), cut(whole, columns))
    assert torch.equal(read(dummy(shape, "BF16"), shape), whole.bfloat16().float())
    assert not torch.equal(read(dummy(shape, key=8), shape), whole)


@pytest.mark.parametrize("key", [0, 7, 2**63 - 1, 2**64 - 1])
def test_dummy_values_are_evenly_spread(key):
    values = read(dummy((512, 1024), key=key), (512, 1024))
    bound = (3 / 1024) ** 0.5
    assert float(values.abs().max()) <= bound
    assert abs(float(values.mean())) < 0.01 * bound
    assert float(values.std()) == pytest.approx(1024**-0.5, rel=0.01)
    spectrum = torch.linalg.svdvals(values)  # of independent values: from 1 - sqrt(1/2) to 1 + sqrt(1/2)
    assert 0.25 < float(spectrum[-1]) < float(spectrum[0]) < 1.8
    other = read(dummy((512, 1024), key=key ^ 0x5851F42D4C957F2D), (512, 1024))
    assert abs(float((values * other).mean())) < 0.01 * bound**2


def test_dummy_norms_lie_around_one_and_biases_around_zero():
    norm, bias = read(dummy((4096,)), (4096,)), read(dummy((4096,), name="x.bias"), (4096,))
    assert 0.9 <= float(norm.min()) < float(norm.max()) <= 1.1
    assert float(bias.abs().max()) <= 0.02
    assert dummy_weights.scale("sinks", (64,)) == (0.0, 0.02)


@pytest.mark.parametrize(("ranks", "count"), [(1, 9), (2, 0), (2, 1), (2, 16), (2, 21), (8, 100)])
def test_ranks_take_turns_at_what_all_of_them_read(ranks, count):
    streams, rng = 4, random.Random(count)
    shared = [rng.random() < 0.6 for _ in range(count)]
    orders = [windows.take_turns(list(range(count)), shared, rank, ranks, streams) for rank in range(ranks)]
    assert orders[0] == list(range(count))
    places = [place for place in range(count) if shared[place]]
    for order in orders:
        assert sorted(order) == list(range(count))
        assert all(order[place] == place for place in range(count) if not shared[place])
        moved = [abs(places.index(order[place]) - number) for number, place in enumerate(places)]
        assert max(moved, default=0) < ranks * streams
    if len(places) >= ranks * streams:  # they begin with different ones
        begun = [order[place] for order in orders for place in places[:streams]]
        assert len(set(begun)) == ranks * streams
