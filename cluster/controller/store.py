"""What must survive the controller: desired models, generations, nodes that drain, ports used. One JSON file."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.controller.desired import Desired, model_from_json, model_to_json
from cluster.controller.fleet import SlotRecord
from cluster.domain.errors import ConfigError
from cluster.domain.ids import ReplicaId

FORMAT = 1


@dataclass(frozen=True, slots=True)
class StoredState:
    """``life``: how often a controller has started on this state. ``control_port``: 0 until one was bound.

    ``state_id`` names this state: made with its file, kept as long as that. ``draining``: address of a node by its id.
    """

    life: int = 0
    desired: Desired = ()
    slots: Mapping[ReplicaId, SlotRecord] = field(default_factory=dict)
    port_cursor: int = 0
    control_port: int = 0
    state_id: str = ""
    draining: Mapping[str, str] = field(default_factory=dict)


class Store:
    """One file, replaced as a whole and synced: a crash leaves the old state or the new one, never half of it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "state" / "controller.json"

    def load(self) -> StoredState:
        """The last state saved, or an empty one; ConfigError when the file is not what ``save`` wrote."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return StoredState()
        try:
            return _from_json(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            msg = f"The controller's state in {self.path} is damaged ({error}); stop the cluster and remove that file."
            raise ConfigError(msg) from error

    def save(self, state: StoredState) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self.path.with_suffix(".new")
        with draft.open("w", encoding="utf-8") as file:
            json.dump(_to_json(state), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def begin_life(self) -> StoredState:
        """Loads, counts one more life and saves: called once by each start of a controller."""
        state = self.load()
        state = replace(state, life=state.life + 1, state_id=state.state_id or uuid.uuid4().hex)
        self.save(state)
        return state


def _to_json(state: StoredState) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "state_id": state.state_id,
        "life": state.life,
        "control_port": state.control_port,
        "port_cursor": state.port_cursor,
        "draining": dict(state.draining),
        "models": [model_to_json(model) for model in state.desired],
        "slots": {
            str(replica): {
                "generation": record.generation,
                "fingerprint": record.fingerprint,
                "world_size": record.world_size,
            }
            for replica, record in state.slots.items()
        },
    }


def _from_json(stored: Mapping[str, Any]) -> StoredState:
    if stored["format"] != FORMAT:
        raise ValueError(f"its format is {stored['format']!r}, this version reads {FORMAT}")
    return StoredState(
        life=int(stored["life"]),
        state_id=str(stored.get("state_id", "")),
        desired=tuple(model_from_json(model) for model in stored["models"]),
        slots={ReplicaId.parse(name): SlotRecord(**record) for name, record in stored["slots"].items()},
        port_cursor=int(stored["port_cursor"]),
        control_port=int(stored["control_port"]),
        draining={str(node_id): str(host) for node_id, host in stored.get("draining", {}).items()},
    )
