"""Where the engine's own CPU kernels lie once they are compiled (by ops/setup). Standard library only."""

from __future__ import annotations

import platform
from pathlib import Path

from cluster.engine.shm_kernel import extensions_dir

# What Linux calls the features that each build needs, best first (x86-64 psABI, levels 4 and 3).
_X86_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_X86_V4 = _X86_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_NEEDS = {"x86-64-v4": _X86_V4, "x86-64-v3": _X86_V3}


def folder() -> Path:
    return extensions_dir() / "llm_cluster_kernels"


def best_file() -> Path | None:
    """The best library that this processor can run, or None where none was built for it."""
    paths = (folder() / f"{kind}.so" for kind in _runnable())
    return next((path for path in paths if path.is_file()), None)


def _runnable() -> list[str]:
    machine = platform.machine()
    if machine == "aarch64":
        return ["armv8-a"]
    if machine != "x86_64":
        return []
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return [kind for kind, needs in _NEEDS.items() if needs <= flags]
