"""For which checkpoint a new request is tokenized, while replicas of another one take over. Pure.

Both serve then: who asked only the older ones would be refused as they drain, and the newer ones would stand idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckpointRoom:
    """Room at the endpoints of one checkpoint: ``endpoints`` of them, of which ``asked`` (one at least) were looked at.

    ``sound``: how many of those are neither slow nor ejected; ``places``: sequences that these would begin soon.
    """

    endpoints: int
    asked: int
    sound: int
    places: int

    @property
    def free_places(self) -> float:
        """At all sound endpoints, if those that were not asked are like those that were."""
        return self.places * self.endpoints / self.asked


def roomiest(rooms: Sequence[CheckpointRoom]) -> int:
    """The position of the one that a new request goes to, of at least one.

    With some sound endpoint, if any has; of these with the most free places; then the most endpoints; then the first.
    """
    return max(range(len(rooms)), key=lambda at: (rooms[at].sound > 0, rooms[at].free_places, rooms[at].endpoints))
