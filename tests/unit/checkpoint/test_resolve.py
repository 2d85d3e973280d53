"""What a model's name means."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.checkpoint.resolve import fetch, fetch_config, resolve
from cluster.domain.errors import CheckpointError, ConfigError


def test_a_directory_is_itself(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    resolved = resolve(str(tmp_path / "my-model") + "/")
    assert resolved.name == "my-model"
    assert resolved.path == (tmp_path / "my-model").resolve()
    assert fetch(resolved) == fetch_config(resolved) == resolved.path


@pytest.mark.parametrize("model", ["/no/such/model", "./model", "model", "a/b/c", "~/none", "org/na me"])
def test_what_is_neither_path_nor_hub_id_is_one_sentence(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="does not exist; give a directory"):
        resolve(model)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(CheckpointError, match="give the directory"):
        resolve(str(tmp_path / "x.safetensors"))
