"""How a driver and the benchmark talk: one JSON object in a line. Standard library only: it runs in any environment.

The benchmark sends the configuration, then runs, then ``{"end": true}``. The driver answers ``{"ready": ...}`` when its
first token has come and one ``{"requests": [...]}`` for each run. Times are of CLOCK_MONOTONIC, which all processes
of a machine share. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata


@dataclass
class Request:
    """One request of a run: when it was sent, and each of its tokens with the time it came."""

    started_s: float
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def take(self, token_ids: Iterable[int]) -> None:
        now = time.monotonic()
        for token in token_ids:
            self.token_ids.append(token)
            self.times_s.append(now)


@dataclass(frozen=True)
class Job:
    """``concurrency`` clients send ``prompts``, each its next one when its last has ended; in order of the list."""

    prompts: list[list[int]]
    concurrency: int
    new_tokens: int


Run = Callable[[Job], list[Request]]


def versions(*packages: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in packages}


def drive(start: Callable[[dict], tuple[Run, dict[str, str]]], end: Callable[[], None] = lambda: None) -> None:
    """Life of a driver. ``start`` gets the configuration and returns what runs a job, and the versions in use."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # so that what a library prints is in the log when somebody looks

    def say(message: dict) -> None:
        out.write(json.dumps(message) + "\n")

    config = json.loads(sys.stdin.readline())
    try:
        run, found = start(config)
        [first] = run(Job([config["first_prompt"]], 1, 1))
        say({"ready": {"first_token_s": first.times_s[0], "versions": found, "spawned_s": config.get("spawned_s")}})
        for line in sys.stdin:
            message = json.loads(line)
            if "end" in message:
                break
            say({"requests": [asdict(request) for request in run(Job(**message["run"]))]})
    finally:
        end()
