"""Contenders as processes: started, spoken to, stopped while others run, ended with all that they started."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
import uuid
from pathlib import Path

DRIVERS = Path(__file__).with_name("drivers")
MARK = "ENGINE_BENCH_CONTENDER"
READY_DEADLINE_S, RUN_DEADLINE_S, END_DEADLINE_S = 600.0, 300.0, 60.0
_TICKS = os.sysconf("SC_CLK_TCK")


class ContenderError(Exception):
    """It said nothing useful; the log tells."""


class Contender:
    """One life of one contender. Every process that comes of it carries a mark in its environment."""

    def __init__(self, driver: str, python: Path, config: dict, environment: dict[str, str], log: Path) -> None:
        self._mark, self._log = uuid.uuid4().hex, log
        self.spawned_s = time.monotonic()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [python, DRIVERS / f"{driver}.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env={**os.environ, **environment, MARK: self._mark}, text=True, bufsize=1,
            )  # fmt: skip
        self._say(config)
        ready = self._hear(READY_DEADLINE_S)["ready"]
        self.versions: dict[str, str] = ready["versions"]
        # From the command to the first token; a driver that starts a server says when it did.
        self.start_up_s: float = ready["first_token_s"] - (ready["spawned_s"] or self.spawned_s)

    def run(self, prompts: list[list[int]], concurrency: int, new_tokens: int) -> dict:
        """The driver's answer, with ``cpu_s``: what all its processes spent meanwhile."""
        before = self._cpu_s()
        self._say({"run": {"prompts": prompts, "concurrency": concurrency, "new_tokens": new_tokens}})
        answer = self._hear(RUN_DEADLINE_S)
        return answer | {"cpu_s": self._cpu_s() - before}

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Asks, then kills whatever is left."""
        self.resume()
        with contextlib.suppress(OSError, ValueError):
            self._say({"end": True})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_DEADLINE_S)
        self._kill()

    def _say(self, message: dict) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")

    def _hear(self, deadline_s: float) -> dict:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], deadline_s)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            self._kill()
            raise ContenderError(f"no answer within {deadline_s:.0f} s or a crash; see {self._log}")
        return json.loads(line)

    def _kill(self) -> None:
        until_s = time.monotonic() + END_DEADLINE_S
        while self._members():
            if time.monotonic() > until_s:
                raise ContenderError(f"processes {self._members()} outlive SIGKILL; end them by hand")
            self._signal(signal.SIGKILL)
            time.sleep(0.01)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not sent any more
                if pipe is not None:
                    pipe.close()

    def _members(self) -> list[int]:
        found, mark = [], f"{MARK}={self._mark}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    if mark in (folder / "environ").read_bytes():
                        found.append(int(folder.name))
        return found

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _cpu_s(self) -> float:
        total = 0
        for pid in self._members():
            with contextlib.suppress(OSError):
                # After the name in brackets: utime and stime are fields 14 and 15 of the line.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / _TICKS
