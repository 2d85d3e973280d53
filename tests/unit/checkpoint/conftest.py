"""A tiny Llama checkpoint, whole and in parts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.tensors import expected_tensors


def _files() -> Any:
    name = "safetensors_files"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("safetensors_files.py"))
        assert spec
        assert spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def files() -> Any:
    """The writers of safetensors_files.py."""
    return _files()


@pytest.fixture
def tiny(tmp_path: Path, files: Any) -> Callable[..., Path]:
    """Writes the tiny Llama: ``tiny(files=2, config={...}, drop=(...), shapes={...}, extra={...})``."""

    def write(
        *, files_count: int = 1, config: dict[str, Any] | None = None, drop: tuple[str, ...] = (),
        extra: dict[str, tuple[int, ...]] | None = None,
    ) -> Path:  # fmt: skip
        shapes = {t.name: t.shape for t in expected_tensors(model_spec(files.TINY_LLAMA)) if t.name not in drop}
        directory: Path = files.write_checkpoint(
            tmp_path / "tiny", files.TINY_LLAMA | (config or {}), shapes | (extra or {}), files_count
        )
        return directory

    return write
