"""Which endpoints are much slower than their peers, from the pace of their step messages. Pure: time is an argument.

An endpoint's pace is the median of its last steps' times. It is compared with the median of the other endpoints of the
same model, so that load, model and machine explain nothing away: a replica alone is never slow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.domain.ids import Incarnation


@dataclass(frozen=True, slots=True)
class SlownessRules:
    """Times in seconds, factors of the others' median."""

    steps: int = 15  # over which the median is taken; eight slow ones turn it
    judged_steps: int = 4  # a verdict comes after so many
    slow_factor: float = 3.0  # a larger batch or prompts beside the decodes explain less than this
    recovered_factor: float = 1.5
    floor_s: float = 0.02  # steps as quick as this are never slow: noise alone would make them so
    fresh_s: float = 10.0  # an endpoint without a step for so long is no measure for others
    gathered_s: float = 0.25  # at most so often are the paces of a model's endpoints gathered ...
    gathered_endpoints: int = 200  # ... where they are so many; with more of them accordingly less often
    first_probe_s: float = 5.0  # after the verdict; each probe in vain doubles the wait for the next
    longest_probe_s: float = 60.0


@dataclass(slots=True)
class _Verdict:
    """On a slow endpoint. ``others_s``: what it was compared with last."""

    others_s: float
    probe_at_s: float
    probe_wait_s: float


@dataclass(slots=True)
class _Peers:
    """The endpoints of one model that are up; ``medians_s`` are sorted and those of ``gathered_at_s``."""

    paces: set[Pace] = field(default_factory=set)
    slow: set[Pace] = field(default_factory=set)
    medians_s: list[float] = field(default_factory=list)
    gathered_at_s: float = float("-inf")

    def gather(self, now_s: float, fresh_s: float) -> None:
        """Takes less than a microsecond for each endpoint."""
        known = []
        for pace in self.paces:
            median_s = pace.gathered_s = pace.median_s if now_s - pace.heard_s <= fresh_s else None
            if median_s is not None:
                known.append(median_s)
        self.medians_s, self.gathered_at_s = sorted(known), now_s


class Pace:
    """The steps of one endpoint, as one router sees them, and the verdict on it.

    ``stepped`` is called for each message: it costs O(1), and now and then a few microseconds for a verdict.
    """

    __slots__ = (
        "_last_s", "_last_step", "_peers", "_rules", "_seconds", "_unjudged", "_verdict", "gathered_s", "heard_s",
        "median_s",
    )  # fmt: skip

    def __init__(self, peers: _Peers, rules: SlownessRules) -> None:
        self._peers, self._rules = peers, rules
        self._seconds: deque[float] = deque(maxlen=rules.steps)
        self._unjudged = 0
        self._last_s: float | None = None
        self._last_step = 0
        self.median_s: float | None = None  # when the last verdict was due; None before there were enough steps
        self.heard_s = float("-inf")
        self.gathered_s: float | None = None  # what of it is among the peers' medians
        self._verdict: _Verdict | None = None

    def stepped(self, now_s: float, step: int, *, busy: bool) -> None:
        """Step number ``step`` of the engine has come; ``busy``: the engine goes on to the next one at once.

        Messages may skip steps, in which this router had no part or which were merged: then each takes its share.
        """
        steps = step - self._last_step
        if self._last_s is not None and steps > 0:
            self._seconds.append((now_s - self._last_s) / steps)
            self._unjudged += 1
        self._last_step = step
        self._last_s = now_s if busy else None
        if self._unjudged >= self._rules.judged_steps and len(self._seconds) > self._rules.steps // 2:
            self._judge(now_s)

    def idle(self) -> None:
        """The engine has nothing to do: what passes until its next step is not the step's time."""
        self._last_s = None

    @property
    def slow(self) -> bool:
        """Found slow and not recovered, probe or not."""
        return self._verdict is not None

    def avoided(self, now_s: float) -> bool:
        """Slow, and no probe is due."""
        return self._verdict is not None and now_s < self._verdict.probe_at_s

    def picked(self, now_s: float) -> None:
        """A request goes there; when a probe is due, this is it."""
        verdict = self._verdict
        if verdict is not None and now_s >= verdict.probe_at_s:
            verdict.probe_wait_s = min(2 * verdict.probe_wait_s, self._rules.longest_probe_s)
            verdict.probe_at_s = now_s + verdict.probe_wait_s

    def acquit(self) -> None:
        self._verdict = None
        self._peers.slow.discard(self)

    def leave(self) -> None:
        """The endpoint is down: it is nobody's peer any more."""
        self.acquit()
        self._peers.paces.discard(self)
        # Peers have gone: the least slow ones are trusted again, so that the bound holds.
        for pace in sorted(self._peers.slow, key=Pace._times_slower)[: self._excess()]:
            pace.acquit()

    def _judge(self, now_s: float) -> None:
        rules = self._rules
        self._unjudged, self.heard_s = 0, now_s
        self.median_s = pace_s = sorted(self._seconds)[len(self._seconds) // 2]
        others_s = self._others(now_s)
        verdict = self._verdict
        if verdict is not None:
            verdict.others_s = others_s = verdict.others_s if others_s is None else others_s
            if pace_s <= max(rules.floor_s, rules.recovered_factor * others_s):
                self.acquit()
        elif others_s is not None and pace_s > max(rules.floor_s, rules.slow_factor * others_s):
            self._peers.slow.add(self)
            if self._excess() > 0:
                self._peers.slow.discard(self)
            else:
                self._verdict = _Verdict(others_s, now_s + rules.first_probe_s, rules.first_probe_s)

    def _others(self, now_s: float) -> float | None:
        """The upper median of the others' paces; None when there are none."""
        peers, rules = self._peers, self._rules
        every_s = rules.gathered_s * max(1.0, len(peers.paces) / rules.gathered_endpoints)
        if now_s - peers.gathered_at_s >= every_s:
            peers.gather(now_s, rules.fresh_s)
        return _median_without(peers.medians_s, self.gathered_s)

    def _times_slower(self) -> float:
        return 0.0 if self._verdict is None or self.median_s is None else self.median_s / self._verdict.others_s

    def _excess(self) -> int:
        """How many slow ones are too many: at most half of all may be."""
        return max(0, len(self._peers.slow) - len(self._peers.paces) // 2)


class Slowness:
    """The paces of all endpoints that are up, and who is slow. At most half of a model's endpoints are.

    A slow endpoint gets no new work and soon shows no pace, so now and then one request goes there as a probe: after
    a wait ``slow`` says no, and from the next ``picked`` on yes again, until the steps of one or more probes have
    turned the median.
    """

    def __init__(self, rules: SlownessRules | None = None) -> None:
        self._rules = rules or SlownessRules()
        self._models: dict[str, _Peers] = {}
        self._paces: dict[Incarnation, Pace] = {}

    def came_up(self, incarnation: Incarnation) -> Pace:
        """The pace to be fed from now on; what was known of an earlier session is forgotten."""
        self.went_down(incarnation)
        peers = self._models.setdefault(incarnation.replica.model, _Peers())
        pace = self._paces[incarnation] = Pace(peers, self._rules)
        peers.paces.add(pace)
        return pace

    def went_down(self, incarnation: Incarnation) -> None:
        pace = self._paces.pop(incarnation, None)
        if pace is None:
            return
        pace.leave()
        if not self._models[incarnation.replica.model].paces:
            del self._models[incarnation.replica.model]

    def picked(self, incarnation: Incarnation, now_s: float) -> None:
        """A request goes there; when a probe is due, this is it."""
        pace = self._paces.get(incarnation)
        if pace is not None:
            pace.picked(now_s)

    def slow(self, incarnation: Incarnation, now_s: float) -> bool:
        """Whether new work should rather go elsewhere."""
        pace = self._paces.get(incarnation)
        return pace is not None and pace.avoided(now_s)


def _median_without(ordered: list[float], one: float | None) -> float | None:
    """The upper median of the sorted values, less one of those that equal ``one``; None when nothing is left."""
    if one is None:
        return ordered[len(ordered) // 2] if ordered else None
    others = len(ordered) - 1
    if others < 1:
        return None
    middle = others // 2
    # Without the removed value all that came after it moves one place down.
    return ordered[middle + 1] if one <= ordered[middle] else ordered[middle]
