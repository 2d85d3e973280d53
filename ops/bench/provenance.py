"""Where and of what a benchmark's figures are: what every result file says beside them. Standard library only."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def facts() -> dict[str, Any]:
    """Date, commit (``modified``: with changes that no commit has), machine and load before the run."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain")),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """``cores_used``: those that this process may run on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    lines = Path("/proc/meminfo").read_text().splitlines()
    memory = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    return {
        "cpu": model, "cores": os.cpu_count(), "cores_used": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**20, 1), "kernel": platform.release(), "python": platform.python_version(),
        "python_build": " ".join((*platform.python_build(), platform.python_compiler())),
        "load_average_before": os.getloadavg(),
    }  # fmt: skip


def write(path: Path, result: dict[str, Any]) -> None:
    """The result with the load after the run; ``result`` holds ``facts()``."""
    result["machine"]["load_average_after"] = os.getloadavg()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def git(*arguments: str) -> str:
    """What git says about this checkout; "" where there is none."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
