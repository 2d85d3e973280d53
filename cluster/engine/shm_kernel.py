"""Where DeepSpeed's shared-memory all-reduce lies once it is compiled (by ops/setup). Standard library only."""

from __future__ import annotations

import os
import sys
from pathlib import Path

EXTENSION = "deepspeed_shm_comm"


def extensions_dir() -> Path:
    """Torch's folder of compiled extensions: $TORCH_EXTENSIONS_DIR, or ours inside the environment."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def kernel_file() -> Path:
    return extensions_dir() / EXTENSION / f"{EXTENSION}.so"


def is_built() -> bool:
    """Whether a rank here can use it; one that is not built is never compiled at a rank's start."""
    return kernel_file().is_file()
