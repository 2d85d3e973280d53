"""Models from a hub: one commit, only the files that are needed, one downloader per node, no network afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 4096,
    "pytorch_model.bin": b"never",
    "modeling.py": b"never",
    "original/consolidated.safetensors": b"never",
}


class Hub(BaseHTTPRequestHandler):
    """The endpoints of a hub that a download needs, and a count of what was asked."""

    asked: Counter[str]
    files = FILES
    knows_ranges = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its base's name
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked[f"{self.command} {path}"] += 1
        if path in ("/api/models/org/tiny/revision/main", f"/api/models/org/tiny/revision/{COMMIT}"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            self._send(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode(), body=body)
            return
        prefix = f"/org/tiny/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and name in self.files:
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            partial = bool(last) and self.knows_ranges
            content = self.files[name][int(first) : int(last) + 1] if partial else self.files[name]
            self.asked[f"bytes {name}"] += len(content) if body else 0
            self._send(206 if partial else 200, content, body=body)
            return
        error = "RevisionNotFound" if "/org/tiny/" in path else "RepoNotFound"
        self._send(404, b'{"error": "no"}', body=body, error=error)

    def _send(self, status: int, content: bytes, *, body: bool, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[tuple[str, Counter[str]]]:
    with serving() as found:
        yield found


@contextmanager
def serving(**changes: Any) -> Iterator[tuple[str, Counter[str]]]:
    """A hub's address, and what it was asked. ``changes``: of the class ``Hub``."""
    asked: Counter[str] = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("CountingHub", (Hub,), {"asked": asked} | changes))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join(10)
    assert not thread.is_alive()


_FETCH = """
import json, sys
from cluster.checkpoint.resolve import fetch, resolve
from cluster.domain.errors import ClusterError
heard = []
try:
    resolved = resolve(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    path = fetch(resolved, lambda here, total: heard.append((here, total)))
except ClusterError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(json.dumps({"path": str(path), "commit": resolved.commit, "name": resolved.name, "heard": heard,
                  "torch": "torch" in sys.modules}))
"""


_OUTLINE = """
import json, sys
from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.resolve import fetch, read_outline, resolve
from cluster.domain.errors import ClusterError
try:
    resolved = resolve("org/tiny", None)
    outline = read_outline(resolved)
    whole = read_checkpoint(fetch(resolved)) if "fetch" in sys.argv else outline
    again = read_outline(resolved)
except ClusterError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(json.dumps({"digests": [outline.digest, whole.digest, again.digest], "tensors": len(outline.tensors),
                  "nbytes": outline.nbytes_by_name, "whole": whole.nbytes_by_name,
                  "here": [file.is_file() for file in outline.files]}))
"""


def start(endpoint: str, home: Path, *arguments: str, code: str = _FETCH) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):  # this hub is ours, on loopback
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_two_processes_of_a_node_download_once_and_need_no_network_afterwards(
    hub: tuple[str, Counter[str]], tmp_path: Path
) -> None:
    endpoint, asked = hub
    both = [start(endpoint, tmp_path, "org/tiny") for _ in range(2)]
    answers = [finish(process) for process in both]
    assert answers[0]["path"] == answers[1]["path"]
    assert {answer["commit"] for answer in answers} == {COMMIT}
    assert not answers[0]["torch"]
    directory = Path(answers[0]["path"])
    assert sorted(file.name for file in directory.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    downloads = {path: count for path, count in asked.items() if path.startswith("GET /org/tiny/resolve/")}
    assert downloads == {
        f"GET /org/tiny/resolve/{COMMIT}/{name}": 1 for name in ("config.json", "tokenizer.json", "model.safetensors")
    }
    total = sum(len(FILES[name]) for name in ("config.json", "tokenizer.json", "model.safetensors"))
    heard = [answer["heard"] for answer in answers if answer["heard"]]
    assert len(heard) == 1
    assert heard[0][-1] == [total, total]
    assert [here for here, _ in heard[0]] == sorted(here for here, _ in heard[0])
    # Nobody listens on port 9: the revision is remembered, the marker says that every file is here.
    assert finish(start("http://127.0.0.1:9", tmp_path, "org/tiny"))["path"] == answers[0]["path"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("org/none",), "ConfigError: The hub has no model org/none"),
        (("org/tiny", "v9"), "ConfigError: org/tiny has no such revision"),
    ],
)
def test_what_the_hub_lacks_is_one_sentence(
    hub: tuple[str, Counter[str]], tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    process = start(hub[0], tmp_path, *arguments)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert says in err
    assert "Traceback" not in err


def shard(names: list[str], floats: int) -> bytes:
    """A safetensors file of float32 tensors of that many numbers each."""
    entries = {
        name: {"dtype": "F32", "shape": [floats], "data_offsets": [4 * floats * i, 4 * floats * (i + 1)]}
        for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4 * floats * len(names))


# The second header alone is larger than what is asked for at first.
SHARDS = {
    "model-00001-of-00002.safetensors": shard(["a", "b"], 500_000),
    "model-00002-of-00002.safetensors": shard([f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2000)], 500),
}
WEIGHT_MAP = {"a": 1, "b": 1} | {f"model.layers.{i}.self_attn.q_proj.weight": 2 for i in range(2000)}
SHARDED = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {name: f"model-0000{number}-of-00002.safetensors" for name, number in WEIGHT_MAP.items()}}
    ).encode(),
    **SHARDS,
}


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_an_outline_reads_headers_and_no_weights(tmp_path: Path, knows_ranges: bool) -> None:
    with serving(files=SHARDED, knows_ranges=knows_ranges) as (endpoint, asked):
        outline = finish(start(endpoint, tmp_path, code=_OUTLINE))
        assert outline["tensors"] == len(WEIGHT_MAP)
        assert outline["nbytes"]["a"] == 2_000_000
        assert outline["here"] == [False, False]
        if knows_ranges:  # one that knows none is left early, which bytes in sockets' buffers do not show
            weights = sum(count for key, count in asked.items() if key.startswith("bytes model-"))
            assert weights < 2 * 3 * 250_000 < sum(map(len, SHARDS.values())) / 4


def test_an_outline_is_the_checkpoint_that_the_ranks_will_find(tmp_path: Path) -> None:
    """Its digest above all; and once everything is here, nothing is asked any more."""
    with serving(files=SHARDED) as (endpoint, asked):
        both = finish(start(endpoint, tmp_path, "fetch", code=_OUTLINE))
        assert len(set(both["digests"])) == 1
        assert both["nbytes"] == both["whole"]
        asked.clear()
        later = finish(start(endpoint, tmp_path, code=_OUTLINE))
        assert later["digests"][0] == both["digests"][0]
        assert later["here"] == [True, True]
        assert [key for key in asked if "/resolve/" in key] == []


def test_a_damaged_header_on_the_hub_is_one_sentence(tmp_path: Path) -> None:
    damaged = SHARDED | {"model-00001-of-00002.safetensors": b"\xff" * 64}
    with serving(files=damaged) as (endpoint, _):
        process = start(endpoint, tmp_path, code=_OUTLINE)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "CheckpointError: org/tiny/model-00001-of-00002.safetensors is damaged" in err
    assert "Traceback" not in err


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path) -> None:
    process = start("http://127.0.0.1:9", tmp_path, "org/tiny")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "HubError: The hub could not be asked for org/tiny" in err
    assert "Traceback" not in err
