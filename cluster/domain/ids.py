"""Who is who: replicas and ranks have names that survive a restart of everything that names them."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.domain.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class ReplicaId:
    """One of a model's replicas: the slot stays, its generations come and go."""

    model: str
    slot: int

    def __str__(self) -> str:
        return f"{self.model}/{self.slot}"

    @classmethod
    def parse(cls, text: str) -> ReplicaId:
        """The inverse of ``str``; ConfigError when ``text`` is not MODEL/SLOT."""
        model, separator, slot = text.rpartition("/")
        if not separator or not model or not slot.isdecimal():
            msg = f"{text!r} names no replica; write it as MODEL/SLOT, for example demo/0."
            raise ConfigError(msg)
        return cls(model, int(slot))


@dataclass(frozen=True, slots=True, order=True)
class Incarnation:
    """One life of a replica. A higher generation fences every lower one out."""

    replica: ReplicaId
    generation: int

    def __str__(self) -> str:
        return f"{self.replica}#{self.generation}"


@dataclass(frozen=True, slots=True, order=True)
class RankId:
    """One process of one incarnation."""

    incarnation: Incarnation
    rank: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.rank}"
