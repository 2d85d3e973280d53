"""When a process that died is started again, and when one that is silent has to die. Pure."""

from __future__ import annotations

from dataclasses import dataclass

STABLE_S = 60.0  # who lived for so long begins anew
PAUSE_FIRST_S = 0.25
PAUSE_MAX_S = 15.0
# Rounds in a row in which a process may be asked in vain. They are counted rather than timed: while its parent stands
# still, silence proves nothing.
SILENT_ROUNDS = 4


@dataclass(slots=True)
class Respawn:
    """The deaths of one process in a row."""

    deaths: int = 0

    def pause_after_s(self, lived_s: float) -> float:
        """Seconds before the next start, after a death at the age of ``lived_s``: none at first, doubling, bounded."""
        self.deaths = 1 if lived_s >= STABLE_S else self.deaths + 1
        return 0.0 if self.deaths == 1 else min(PAUSE_FIRST_S * 2.0 ** min(self.deaths - 2, 16), PAUSE_MAX_S)


@dataclass(slots=True)
class Silence:
    """Of one process that is asked again and again."""

    rounds: int = 0

    def asked(self, *, answered: bool) -> bool:
        """Whether it has been silent for too long: stopped or stuck, it keeps its connections and serves nobody."""
        self.rounds = 0 if answered else self.rounds + 1
        return self.rounds >= SILENT_ROUNDS
