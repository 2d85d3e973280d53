"""What a generation serves, in one digest: by it routers tell whether a stream may go on at another replica."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cluster.checkpoint.layout import weight_files
from cluster.checkpoint.manifest import MANIFEST_FILE
from cluster.controller.desired import DesiredModel
from cluster.domain.errors import CheckpointError


def served_digest(model: DesiredModel, weights: str) -> str:
    """Equal for two generations of the same weights, loaded in the same way: what decides about a stream's next token.

    ``weights``: what ``weights_seen`` said. Neither the number of replicas nor limits nor the layout are part of it.
    """
    facts = {
        "checkpoint": model.checkpoint_digest,
        "source": model.checkpoint_path,
        "revision": model.revision,
        "dtype": model.dtype.value,
        "rope_scaling": model.config.rope_scaling,
        "load_format": model.config.load_format,
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def weights_seen(model: DesiredModel) -> str:
    """What tells the weights in a directory from others that lay there before; blocks on the disk.

    The manifest's digest, or else every weight file's size and time of change. To be asked by one observer only: copies
    on several nodes are the same weights, at different times. "" for what cannot change: a commit of a hub repository,
    weights that are made up. Files that are not there for this observer do not keep ranks from reading theirs. OSError
    for those that are and cannot be looked at.
    """
    if model.revision is not None or model.config.load_format == "dummy":
        return ""
    folder = Path(model.checkpoint_path)
    try:
        if (folder / MANIFEST_FILE).is_file():
            with (folder / MANIFEST_FILE).open("rb") as manifest:
                return f"manifest {hashlib.file_digest(manifest, 'sha256').hexdigest()}"
        stats = {file.name: file.stat() for file in weight_files(folder)}
    except (CheckpointError, FileNotFoundError, NotADirectoryError):
        return "unseen"
    return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())])
