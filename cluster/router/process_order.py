"""What the parent of several router processes says to one of them, and what it hears. Pure.

One line of JSON each way: the order on the child's standard input, which stays open for as long as the parent lives;
the answer on its standard output, once it listens or cannot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.config.schema import RouterConfig


@dataclass(frozen=True, slots=True)
class ProcessOrder:
    """``config.port`` is held by the parent, ``index`` counts from 0. Paths are "" where there is none."""

    config: RouterConfig
    controller_address: str
    index: int
    ready_wait_s: float
    state_file: str = ""
    log_file: str = ""

    def to_line(self) -> bytes:
        fields = {name: value for name, value in asdict(self).items() if name != "config"}
        return json.dumps({**fields, "config": self.config.model_dump(mode="json")}).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> ProcessOrder:
        fields: dict[str, Any] = json.loads(line)
        return cls(config=RouterConfig.model_validate(fields.pop("config")), **fields)


@dataclass(frozen=True, slots=True)
class ProcessAnswer:
    """The child's pid and ports; or the sentence that says why it does not serve."""

    pid: int
    ports: Mapping[str, int]
    error: str = ""

    def to_line(self) -> str:
        return json.dumps({"pid": self.pid, "ports": dict(self.ports), "error": self.error}) + "\n"

    @classmethod
    def from_line(cls, line: bytes) -> ProcessAnswer | None:
        """None for what a child that has ended said: nothing. ValueError or TypeError for what is no answer."""
        if not line.endswith(b"\n"):
            return None
        answer = cls(**json.loads(line))
        if not answer.error and "metrics" not in answer.ports:
            raise ValueError("no port of its metrics")
        return answer
