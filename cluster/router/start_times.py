"""How long replicas take from a submit to a first token. Pure."""

from __future__ import annotations

GAIN = 0.05  # how far one first token moves the expectation of the next
DEVIATIONS = 4.0  # as the retransmission timer of TCP has it (RFC 6298): mean and so many mean deviations


class StartTimes:
    """Moving mean and mean deviation; apart for positive priorities, which overtake others in replicas too."""

    def __init__(self) -> None:
        self._means_s = [0.0, 0.0]
        self._deviations_s = [0.0, 0.0]

    def took(self, priority: int, seconds: float) -> None:
        kind = priority > 0
        surprise_s = seconds - self._means_s[kind]
        self._means_s[kind] += GAIN * surprise_s
        self._deviations_s[kind] += GAIN * (abs(surprise_s) - self._deviations_s[kind])

    def expected_s(self, priority: int) -> float:
        """Within which a first token is expected, most of the time; 0 before anything was seen."""
        kind = priority > 0
        return self._means_s[kind] + DEVIATIONS * self._deviations_s[kind]
