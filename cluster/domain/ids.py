"""Who is who: replicas and ranks have names that survive a restart of everything that names them.

Named tuples, since their hashes and comparisons are computed without a line of Python: routers look up incarnations
several times for each request.
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.domain.errors import ConfigError


class ReplicaId(NamedTuple):
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


class Incarnation(NamedTuple):
    """One life of a replica. A higher generation fences every lower one out."""

    replica: ReplicaId
    generation: int

    def __str__(self) -> str:
        return f"{self.replica}#{self.generation}"


class RankId(NamedTuple):
    """One process of one incarnation."""

    incarnation: Incarnation
    rank: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.rank}"
