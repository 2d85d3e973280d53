"""Safetensors headers: what is read, and every way in which a file can be damaged."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cluster.checkpoint.headers import MAX_HEADER_BYTES, read_header
from cluster.domain.errors import CheckpointError


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    import numpy as np

    file = tmp_path / "x.safetensors"
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 4), np.float16)}
    save_file(arrays, str(file), metadata={"format": "pt"})
    header = read_header(file)
    found = {tensor.name: tensor for tensor in header.tensors}
    assert set(found) == {"a", "b"}
    assert (found["b"].dtype, found["b"].shape, found["b"].nbytes) == ("F32", (2, 3), 24)
    content = file.read_bytes()
    assert content[found["b"].offset :][:24] == arrays["b"].tobytes()
    assert header.size == len(content)


def _entry(begin: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": _entry(0, 4, [4])}, 3, "truncated"),
        ({"a": _entry(0, 4, [4])}, 5, "belong to no tensor"),
        ({"a": _entry(0, 4, [4]), "b": _entry(2, 6, [4])}, 6, "overlaps"),
        ({"a": _entry(0, 4, [4]), "b": _entry(6, 8, [2])}, 8, "hole"),
        ({"a": _entry(0, 4, [5])}, 4, "does not fill"),
        ({"a": _entry(4, 0, [4])}, 4, "no valid dtype"),
        ({"a": _entry(0, 4, [-4])}, 4, "no valid dtype"),
        ({"a": _entry(0, 4, [4], "Q9")}, 4, "no valid dtype"),
        ({"a": 7}, 0, "not an object"),
        ([1], 0, "not a JSON object"),
    ],
)
def test_damage_is_named(tmp_path: Path, files: Any, header: Any, data: int, says: str) -> None:
    file = tmp_path / "x.safetensors"
    files.write_raw(file, json.dumps(header).encode(), bytes(data))
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too few"),
        (b"\1\0\0", "too few"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), "more than"),
        (struct.pack("<Q", 50) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"{]", "not JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not JSON"),
    ],
)
def test_a_bad_header_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_header(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=5), cut=st.integers(1, 400))
def test_no_truncated_file_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], cut: int
) -> None:
    file = tmp_path_factory.mktemp("cut") / "x.safetensors"
    offset, entries = 0, {}
    for index, shape in enumerate(shapes):
        entries[f"t{index}"] = _entry(offset, offset + math.prod(shape), list(shape))
        offset += math.prod(shape)
    header = json.dumps(entries).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(offset)
    file.write_bytes(whole)
    assert len(read_header(file).tensors) == len(shapes)
    file.write_bytes(whole[: max(0, len(whole) - cut)])
    with pytest.raises(CheckpointError):
        read_header(file)


def test_a_pointer_of_git_lfs_is_called_by_its_name(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a Git LFS pointer, .*git lfs pull"):
        read_header(file)
