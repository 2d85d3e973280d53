"""The router as a process that another one starts, and may leave."""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.config.process_identity import outlive
from cluster.config.schema import RouterConfig
from cluster.domain.errors import ReplicaError

START_DEADLINE_S = 60.0
END_DEADLINE_S = 10.0

# Routers that this process started: they may outlive it, and those that end before it are reaped here.
_CHILDREN: list[subprocess.Popen[bytes]] = []


def spawn(config: RouterConfig, run_dir: Path, control_address: str) -> tuple[subprocess.Popen[bytes], dict[str, int]]:
    """A router for the controller at ``control_address``, which listens by now, and its ports by name.

    ReplicaError with its last words when it does not start.
    """
    logs = run_dir / "logs"
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = run_dir / "router.yaml"
    settings.write_text(json.dumps({"router": config.model_dump(mode="json")}), encoding="utf-8")
    # -P: whatever is called "cluster" in this folder is not meant.
    command = [sys.executable, "-P", "-m", "cluster", "router", "--controller", control_address]
    command += ["--config", str(settings), "--run-dir", str(run_dir)]
    errors = logs / "router.err"
    with errors.open("wb") as stderr:
        # A session of its own: Ctrl-C in the terminal drains through us, it does not cut streams.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
        )
    line = b""
    try:
        line = _first_line(process)
    finally:
        if not line:
            process.kill()
            process.wait()
    if not line:
        said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = said[-1].removeprefix("llm-cluster: ") if said else "it said nothing"
        raise ReplicaError(f"The router did not start: {reason}")
    ports: dict[str, int] = json.loads(line)["ports"]
    _reap()
    _CHILDREN.append(process)
    return process, ports


def _reap() -> None:
    """Forgets the children that have ended."""
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    with process.stdout as output, selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        if not selector.select(START_DEADLINE_S):
            return b""
        return output.readline()


def end(process: psutil.Process, deadline_s: float) -> None:
    """SIGTERM, and SIGKILL to it and its children when it has not ended ``deadline_s`` later."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
        if outlive([process], deadline_s):
            for one in [*process.children(recursive=True), process]:
                one.kill()
            outlive([process], END_DEADLINE_S)
    _reap()
