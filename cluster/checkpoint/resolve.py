"""From what a user typed to a model: the embedded demo, a directory, or one commit of a hub repository."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.checkpoint.layout import Checkpoint, read_checkpoint
from cluster.domain.errors import CheckpointError, ConfigError

DEMO = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")

# Bytes that are here, bytes in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Either ``path`` (a directory on this machine), or ``repo_id`` at ``commit``, which every node fetches."""

    name: str
    path: Path | None = None
    repo_id: str | None = None
    commit: str | None = None


def resolve(model: str, revision: str | None = None) -> ResolvedModel:
    """What ``model`` means: "demo", a directory, or a hub id, whose ``revision`` is resolved once to a commit."""
    if model == DEMO:
        return ResolvedModel(DEMO, path=demo_path())
    path = Path(model).expanduser()
    if path.is_dir():
        return ResolvedModel(path.resolve().name, path=path.resolve())
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the directory that holds config.json and the weights.")
    if _looks_like_path(model) or not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"{model} does not exist; give a directory in Hugging Face layout, a hub id such as org/name, or demo."
        )
    from cluster.checkpoint import hub

    return ResolvedModel(model.rpartition("/")[2], repo_id=model, commit=hub.resolve_commit(model, revision or "main"))


def fetch(resolved: ResolvedModel, progress: Progress | None = None) -> Path:
    """The model's directory on this node; a hub model is downloaded once per node, then used without network."""
    if resolved.path is not None:
        return resolved.path
    assert resolved.repo_id is not None, resolved
    assert resolved.commit is not None, resolved
    from cluster.checkpoint import hub

    return hub.download(resolved.repo_id, resolved.commit, progress=progress)


def fetch_config(resolved: ResolvedModel) -> Path:
    """A directory with the model's JSON files at least: enough to plan with, no weights needed."""
    if resolved.path is not None:
        return resolved.path
    assert resolved.repo_id is not None, resolved
    assert resolved.commit is not None, resolved
    from cluster.checkpoint import hub

    return hub.download(resolved.repo_id, resolved.commit, weights=False)


def read_outline(resolved: ResolvedModel) -> Checkpoint:
    """The checkpoint as every node will read it. Of a hub model only JSON files and headers are fetched.

    Its tensors' files are there only if the whole commit has been fetched here before.
    """
    if resolved.path is not None:
        return read_checkpoint(resolved.path)
    assert resolved.repo_id is not None, resolved
    assert resolved.commit is not None, resolved
    from cluster.checkpoint import hub

    here = hub.complete_copy(resolved.repo_id, resolved.commit)
    if here is not None:
        return read_checkpoint(here)
    headers = hub.read_headers(resolved.repo_id, resolved.commit)
    return read_checkpoint(hub.download(resolved.repo_id, resolved.commit, weights=False), headers)


def demo_path() -> Path:
    """The checkpoint that ships with the package."""
    path = Path(str(importlib.resources.files("cluster.models"))) / DEMO
    if not path.is_dir():
        raise CheckpointError("The demo model is not part of this installation; install the package again.")
    return path


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~", ".")) or model.count("/") > 1 or "\\" in model
