"""Digests beside the weights: written once, compared by whoever reads."""

import errno
import json
import os

import pytest

from cluster.checkpoint import manifest
from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify, write_manifest
from cluster.cli.main import main
from cluster.domain.errors import CheckpointError

SHAPES = {"a.weight": (300, 200), "b.weight": (50_000,)}


@pytest.fixture
def folder(tmp_path, files):
    return files.write_checkpoint(tmp_path / "model", files.TINY_LLAMA, SHAPES, files=2)


@pytest.fixture
def written(folder):
    told = []
    files = read_checkpoint(folder).files
    write_manifest(folder, files, lambda done, total: told.append((done, total)), chunk_bytes=65536)
    size = sum(file.stat().st_size for file in files)
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    return folder


def edit(folder, **changes):
    file = folder / MANIFEST_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_was_written_is_what_is_read(written):
    digests = read_manifest(written)
    files = read_checkpoint(written).files
    assert set(digests) == {file.name for file in files}
    for file in files:
        content, digest = file.read_bytes(), digests[file.name]
        assert (digest.size, digest.chunk_bytes) == (len(content), 65536)
        for chunk in range(len(digest.sha256)):
            digest.check(file, chunk, content[chunk * 65536 : (chunk + 1) * 65536])
    verify(written, digests, lambda done, total: None)
    assert not list(written.glob(MANIFEST_FILE + "?*"))


def test_a_manifest_does_not_change_who_the_checkpoint_is(folder):
    before = read_checkpoint(folder)
    write_manifest(folder, before.files, lambda done, total: None)
    after = read_checkpoint(folder)
    assert after.digest == before.digest
    assert all(tensor.digests is None for tensor in before.tensors.values())
    assert all(tensor.digests is not None for tensor in after.tensors.values())


@pytest.mark.parametrize("place", [0, 65535, 65536, -1])
def test_a_flipped_bit_is_found_and_its_file_named(written, place):
    file = read_checkpoint(written).files[1]
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged: bytes \d+ to \d+ do not have the sha256"):
        verify(written, read_manifest(written), lambda done, total: None)


def test_a_file_of_another_size_is_refused_before_anything_is_read(written):
    name = read_checkpoint(written).files[0].name
    digests = json.loads((written / MANIFEST_FILE).read_text())["files"]
    digests[name]["size"] -= 1
    edit(written, files=digests)
    with pytest.raises(CheckpointError, match=rf"{name} has \d+ bytes, but {MANIFEST_FILE} says"):
        read_checkpoint(written)


def test_a_file_that_is_missing_or_not_listed_is_named(written):
    files = json.loads((written / MANIFEST_FILE).read_text())["files"]
    name, _ = files.popitem()
    listed = read_manifest(written)
    edit(written, files=files)
    with pytest.raises(CheckpointError, match=f"does not list {name}"):
        read_checkpoint(written)
    assert read_checkpoint(written, manifest=False).files
    (written / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is not there"):
        verify(written, listed, lambda done, total: None)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"algorithm": "md5"}, "algorithm is sha256"),
        ({"chunk_bytes": 100}, "no chunk_bytes from 65536"),
        ({"chunk_bytes": 2**30}, "no chunk_bytes from 65536"),
        ({"chunk_bytes": 65537}, "no chunk_bytes from 65536"),
        ({"files": []}, "lists no files"),
        ({"files": {"x": {}}}, "x has no size and sha256"),
        ({"files": {"x": {"size": 70_000, "sha256": ["0" * 64]}}}, "x does not have one sha256 for every"),
    ],
)
def test_a_manifest_that_is_none_is_refused(written, changes, complaint):
    edit(written, **changes)
    with pytest.raises(CheckpointError, match=complaint):
        read_checkpoint(written)


def test_a_manifest_that_is_no_json_is_refused(folder):
    (folder / MANIFEST_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_checkpoint(folder)


def test_a_file_that_shrinks_while_it_is_hashed_is_named(folder, monkeypatch):
    monkeypatch.setattr(manifest.os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match="ends at byte 0 while it is read"):
        write_manifest(folder, read_checkpoint(folder).files, lambda done, total: None)


def test_the_command_writes_compares_and_writes_anew(folder, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["manifest", *arguments])
        told = capsys.readouterr()
        return left.value.code, told.out + told.err

    code, told = run(str(folder), "--check")
    assert code == 2
    assert f"has no {MANIFEST_FILE}; say 'llm-cluster manifest {folder}' first." in told
    assert "has the digests of 2 files.\n" in run(str(folder))[1]
    code, told = run(str(folder), "--check")
    assert code == 0
    assert "2 files are what" in told
    file = read_checkpoint(folder).files[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, told = run(str(folder), "--check")
    assert code == 1
    assert f"{file} is damaged" in told
    assert run(str(folder))[0] == run(str(folder), "--check")[0] == 0


@pytest.mark.parametrize("call", ["open", "preadv"])
@pytest.mark.parametrize("check", [True, False])
def test_a_file_that_cannot_be_read_is_one_sentence(written, monkeypatch, capsys, call, check):
    real = getattr(os, call)

    def broken(what, *more, **named):
        if call == "preadv" or str(what).endswith("-00002-of-00002.safetensors"):
            if call == "preadv":
                more[0].clear()  # as the call itself holds nothing once it has failed
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(what, *more, **named)

    monkeypatch.setattr(manifest.os, call, broken)
    with pytest.raises(SystemExit) as status:
        main(["manifest", str(written), *(["--check"] if check else [])])
    told = capsys.readouterr().err
    assert status.value.code == (1 if check else 2)
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("llm-cluster: ")]
    assert line.endswith(".safetensors cannot be read (Input/output error); check its permissions and its disk.")
