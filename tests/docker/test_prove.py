"""The parts of ops/docker/prove that need no root, and, as a long test, the whole of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ops.docker import prove_images
from ops.docker.building import Builder, _local_paths
from ops.docker.instructions import DockerfileError, Image, expand, pairs, parse
from ops.docker.roots import Mounts, as_user, mounted_below, remove_points

ROOT = Path(__file__).parents[2]


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "Dockerfile"
        path.write_text(text)
        return path

    return write


class TestParsing:
    def test_a_target_comes_after_all_that_it_needs(self, written) -> None:
        recipe = parse(
            written("FROM a AS one\nFROM one AS two\nFROM b AS three\nCOPY --from=two /x /y\nFROM b AS four\n")
        )
        assert [stage.name for stage in recipe.chain("three")] == ["one", "two", "three"]

    def test_arguments_reach_from(self, written) -> None:
        path = written("ARG V=1\nFROM base:${V} AS one\n")
        assert parse(path).stages["one"].base == "base:1"
        assert parse(path, {"V": "2"}).stages["one"].base == "base:2"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("FROM a AS one\nADD http://x /y\n", "ADD"),
            ("FROM a AS one\nRUN --mount=type=cache,target=/x true\n", "--mount"),
            ("FROM a AS one\nRUN <<X\ntrue\nX\n", "here-documents"),
            ("FROM a\n", "AS name"),
        ],
    )
    def test_what_is_not_known_is_an_error(self, written, text: str, said: str) -> None:
        with pytest.raises(DockerfileError, match=said):
            parse(written(text))

    def test_an_unknown_target_is_an_error(self, written) -> None:
        with pytest.raises(DockerfileError, match="no stage x; there are one"):
            parse(written("FROM a AS one\n")).chain("x")

    @pytest.mark.parametrize(
        ("word", "expected"), [("${A}b", "1b"), ("$A", "1"), ("${B:-2}", "2"), ("${A:-2}", "1"), ("$B", "")]
    )
    def test_variables(self, word: str, expected: str) -> None:
        assert expand(word, {"A": "1"}) == expected

    def test_quotes_are_taken_off_values(self) -> None:
        assert pairs(("a", '"b c"', "d", "'e'")) == {"a": "b c", "d": "e"}

    def test_settings_add_up(self, written) -> None:
        recipe = parse(
            written('FROM a AS one\nENV A=1 B="2 3"\nWORKDIR /x\nWORKDIR y\nENTRYPOINT ["p"]\nCMD ["q"]\nUSER 1:2\n')
        )
        image = Image()
        for step in recipe.stages["one"].steps:
            image.apply(step, step.words)
        assert (image.env, image.workdir, image.user) == ({"A": "1", "B": "2 3"}, "/x/y", "1:2")
        assert (image.entrypoint, image.command) == (("p",), ("q",))


@pytest.mark.parametrize("name", ["docker/prove", "compile-cpu-kernels", "compile-shared-memory-op"])
def test_scripts_can_be_run(name: str) -> None:
    script = ROOT / "ops" / name
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


class TestContext:
    def test_patterns_hold_from_the_root_as_dockers_do(self, written, tmp_path: Path) -> None:
        builder = Builder(parse(written("FROM a AS one\n")), tmp_path, {})
        inside = {path.as_posix() for path in builder.context_files(Path("cluster"))}
        assert {"cluster/__init__.py", "cluster/models/demo/README.md"} <= inside
        assert list(builder.context_files(Path("tests/chart"))) == []


class TestMounts:
    def test_points_are_made_and_taken_away_again(self, tmp_path: Path) -> None:
        root, source = tmp_path / "root", tmp_path / "file"
        (root / "kept").mkdir(parents=True)
        source.touch()
        mounts = Mounts(read_only={source: "/a/b/file", tmp_path: "/kept"}, memory={"/m": "mode=755"})
        made = mounts.place(root)
        assert (root / "a/b/file").is_file()
        assert (root / "m").is_dir()
        remove_points(made)
        assert [path.name for path in root.iterdir()] == ["kept"]

    def test_a_point_that_was_filled_stays(self, tmp_path: Path) -> None:
        made = Mounts(memory={"/m": "mode=755"}).place(tmp_path)
        (tmp_path / "m" / "mine").touch()
        remove_points(made)
        assert (tmp_path / "m" / "mine").exists()

    def test_live_mounts_are_seen(self) -> None:
        table = "1 2 0:3 / /proc rw - proc proc rw\n4 5 0:6 / /tmp/x/root/a\\040b rw - tmpfs tmpfs rw\n"
        assert mounted_below(Path("/tmp/x"), table) == ["/tmp/x/root/a b"]
        assert mounted_below(Path("/tmp/xy"), table) == []

    def test_no_capability_is_left(self) -> None:
        command = as_user("10001:10001", ["id"])
        assert {"--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--clear-groups"} <= set(command)


def test_local_indexes_are_shown_with_their_files(tmp_path: Path) -> None:
    index, wheels = tmp_path / "index" / "simple", tmp_path / "wheels"
    index.mkdir(parents=True)
    wheels.mkdir()
    assert list(_local_paths(f"file://{index} https://pypi.org/simple")) == [index.parent]
    assert list(_local_paths(f"{wheels}")) == [wheels]


class TestWhyNot:
    def test_without_root_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prove_images.shutil, "which", lambda name: f"/bin/{name}")
        monkeypatch.setattr(prove_images.os, "geteuid", lambda: 1000)
        assert "needs root" in prove_images.why_not(10**12)

    def test_without_disk_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prove_images.shutil, "which", lambda name: f"/bin/{name}")
        monkeypatch.setattr(prove_images.os, "geteuid", lambda: 0)
        assert "GB of disk" in prove_images.why_not(1)
        assert prove_images.why_not(10**12) == ""

    def test_without_tools_it_names_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prove_images.shutil, "which", lambda name: None if name == "unshare" else f"/bin/{name}")
        assert "unshare" in prove_images.why_not(10**12)


def test_a_folder_that_is_not_there_is_a_sentence(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["prove", "--folder", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        prove_images.main()
    assert "is no folder; make it first" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.integration
@pytest.mark.timeout(2400)
def test_the_images_serve_on_a_clean_root(tmp_path: Path) -> None:
    if reason := prove_images.why_not(shutil.disk_usage(tmp_path).free):
        pytest.skip(reason)
    # TORCH_INDEX: where this machine gets torch, if not from PyTorch's own index.
    index = os.environ.get("TORCH_INDEX")
    arguments = ["--json", "--folder", str(tmp_path), *(["--build-arg", f"TORCH_INDEX={index}"] if index else [])]
    done = subprocess.run(
        [ROOT / "ops" / "docker" / "prove", *arguments], capture_output=True, text=True, timeout=2300, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    served = result["served"]
    assert served["answer"]
    assert served["shared_memory_op_loaded"] is True
    assert set(served["exit_codes"].values()) == {0}
    assert not any(served["zombies"].values())
    sizes = {row["stage"]: row["bytes"] for row in result["stages"]}
    assert sizes["router"] < sizes["controller"] < sizes["worker"]
    assert list(tmp_path.iterdir()) == []
