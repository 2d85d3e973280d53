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
                env={**os.environ, **environment, MARK: self._mark},
            )  # fmt: skip
        self._heard = b""
        self._say(config)
        ready = self._hear(READY_DEADLINE_S)["ready"]
        self.versions: dict[str, str] = ready["versions"]
        # From the command to the first token; a driver that starts a server says when it did.
        self.start_up_s: float = ready["first_token_s"] - (ready["spawned_s"] or self.spawned_s)

    def run(
        self, prompts: list[list[int]], concurrency: int, new_tokens: int, deadline_s: float = RUN_DEADLINE_S
    ) -> dict:  # fmt: skip
        """The driver's answer, with ``cpu_s``: what all its processes spent meanwhile. One that is late is killed."""
        before = self._cpu_s()
        self._say({"run": {"prompts": prompts, "concurrency": concurrency, "new_tokens": new_tokens}})
        answer = self._hear(deadline_s)
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
        with contextlib.suppress(BrokenPipeError):  # it has crashed, which the next answer tells
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _hear(self, deadline_s: float) -> dict:
        line = self._line(time.monotonic() + deadline_s)
        if line is None:
            self._kill()
            raise ContenderError(f"no answer within {deadline_s:.0f} s or a crash; see {self._log}")
        return json.loads(line)

    def _line(self, until_s: float) -> bytes | None:
        """The next one; None where it, or a part of it, has not come by then, or never will."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._heard:
            readable, _, _ = select.select([pipe], [], [], max(0.0, until_s - time.monotonic()))
            part = os.read(pipe, 2**16) if readable else b""
            if not part:
                return None
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        return line

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
