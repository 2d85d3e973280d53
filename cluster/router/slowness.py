"""Which endpoints are much slower than their peers, from the pace of their step messages. Pure, given time and chance.

An endpoint's pace is the median of its last steps' times. It is compared with that of the other endpoints of the same
model, so that model and machine explain nothing away: a replica alone is never slow. Nor does its load: a step of many
sequences takes longer than one of few, but no more than in proportion. So every verdict rests on peers with at least
half as many sequences in their steps; or, where there are none, on what the steps of those that come nearest would take
with half as many if each took a time of its own. Of many peers some are drawn by lot, for each verdict anew.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from cluster.domain.ids import Incarnation

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class SlownessRules:
    """Times in seconds, factors of the others' median."""

    steps: int = 15  # over which the median is taken; eight slow ones turn it
    judged_steps: int = 4  # a verdict comes after so many
    slow_factor: float = 3.0  # twice the sequences or prompts beside the decodes explain less than this
    recovered_factor: float = 1.5
    much_factor: float = 5.0  # slower than this, a few steps are verdict enough, and the median moves its streams
    much_steps: int = 4  # in a row; every verdict is checked against the median of as many last ones of its peers, ...
    much_peers: int = 32  # of so many of them, drawn by lot: the rest would cost more than it tells
    alike_drawn: int = 5  # of these, where there are more: with fewer as loaded those that come nearest count as well
    floor_s: float = 0.02  # steps as quick as this are never slow: noise alone would make them so
    moved_at_once: int = 4  # sequences: the others have to compute what they have so far
    fresh_s: float = 10.0  # an endpoint without a step for so long is no measure for others
    gathered_s: float = 0.25  # at most so often are the paces of a model's endpoints gathered ...
    gathered_endpoints: int = 200  # ... where they are so many; with more of them accordingly less often
    first_probe_s: float = 5.0  # after the verdict; each probe in vain doubles the wait for the next
    longest_probe_s: float = 60.0


@dataclass(slots=True)
class _Verdict:
    """On a slow endpoint. ``others_s``: what it was compared with last; ``peers``: whom it was found slow beside."""

    others_s: float
    peers: tuple[Pace, ...]
    probe_at_s: float
    probe_wait_s: float
    waited_s: float = 0.0  # before the last probe
    much: bool = False  # slower, by its median
    movable: int | None = None  # sequences that may still leave it


@dataclass(slots=True)
class _Peers:
    """The endpoints of one model that are up; ``medians_s`` are sorted and those of ``gathered_at_s``.

    ``convicted``: who is slow, of all models.
    """

    convicted: set[Pace]
    rng: random.Random
    paces: set[Pace] = field(default_factory=set)
    slow: set[Pace] = field(default_factory=set)
    gathered: list[Pace] = field(default_factory=list)  # whose medians these are; some may have left
    medians_s: list[float] = field(default_factory=list)
    gathered_at_s: float = float("-inf")

    def gather(self, now_s: float, fresh_s: float) -> None:
        """Takes less than a microsecond for each endpoint."""
        known = self.gathered = []
        medians_s = []
        for pace in self.paces:
            median_s = pace.gathered_s = pace.median_s if now_s - pace.heard_s <= fresh_s else None
            if median_s is not None:
                medians_s.append(median_s)
                known.append(pace)
        self.medians_s, self.gathered_at_s = sorted(medians_s), now_s

    def some(self, count: int) -> Collection[Pace]:
        """Everybody, or of more than ``count`` about twice as many of those that were heard lately, by lot.

        Not the same ones each time: where most of these were slow, nobody ever would be.
        """
        if len(self.paces) <= count:
            return self.paces
        drawn = self.rng.sample(self.gathered, min(2 * count, len(self.gathered)))
        return [pace for pace in drawn if pace in self.paces]


class Pace:
    """The steps of one endpoint, as one router sees them, and the verdict on it.

    ``stepped`` is called for each message: it costs O(1), and now and then a few microseconds for a verdict.
    """

    __slots__ = (
        "_counts", "_last_s", "_last_step", "_much_s", "_peers", "_row", "_rules", "_seconds", "_unjudged", "_verdict",
        "gathered_s", "heard_s", "median_s",
    )  # fmt: skip

    def __init__(self, peers: _Peers, rules: SlownessRules) -> None:
        self._peers, self._rules = peers, rules
        self._seconds: deque[float] = deque(maxlen=rules.steps)
        self._counts: deque[int] = deque(maxlen=rules.steps)  # of sequences in these steps
        self._unjudged = 0
        self._last_s: float | None = None
        self._last_step = 0
        self.median_s: float | None = None  # when the last verdict was due; None before there were enough steps
        self.heard_s = float("-inf")
        self.gathered_s: float | None = None  # what of it is among the peers' medians
        self._verdict: _Verdict | None = None
        self._much_s = float("inf")  # much slower than the others, by the last verdict that was due
        self._row = 0  # so many last steps took longer

    def stepped(self, now_s: float, step: int, *, busy: bool, prompts: bool = False, sequences: int = 1) -> None:
        """Step number ``step`` of the engine has come, of so many ``sequences``.

        ``busy``: the engine goes on to the next one at once. ``prompts``: it computed some, which takes long where
        nothing is slow: it neither makes nor breaks a row.
        Messages may skip steps, in which this router had no part or which were merged: then each takes its share.
        """
        steps = step - self._last_step
        if self._last_s is not None and steps > 0:
            seconds = (now_s - self._last_s) / steps
            self._seconds.append(seconds)
            self._counts.append(sequences)
            self._unjudged += 1
            if not prompts:
                self._row = self._row + 1 if seconds > self._much_s else 0
        self._last_step = step
        self._last_s = now_s if busy else None
        if self._row >= self._rules.much_steps and self._verdict is None:
            self._judge_row(now_s)
        if self._unjudged >= self._rules.judged_steps and len(self._seconds) > self._rules.steps // 2:
            self._judge(now_s)

    def idle(self) -> None:
        """The engine has nothing to do: what passes until its next step is not the step's time."""
        self._last_s = None

    def last_steps(self) -> list[float]:
        """The times of the last few steps, in seconds."""
        return list(self._seconds)[-self._rules.much_steps :]

    def last_counts(self) -> list[int]:
        """How many sequences were in each of them."""
        return list(self._counts)[-self._rules.much_steps :]

    @property
    def slow(self) -> bool:
        """Found slow and not recovered, probe or not."""
        return self._verdict is not None

    def leaving(self, open_sequences: int) -> int:
        """How many of so many sequences are better moved elsewhere now, a few with each step.

        Only from an endpoint that is slower by ``much_factor``, and no more than were there when that was certain, and
        the probes since then: each of these may show for ``much_steps`` whether the endpoint has recovered.
        """
        verdict = self._verdict
        if verdict is None or not verdict.much or self._row < self._rules.much_steps:
            return 0
        if verdict.movable is None:
            verdict.movable = open_sequences
        return min(verdict.movable, open_sequences, self._rules.moved_at_once)

    def moved(self, sequences: int) -> None:
        if self._verdict is not None and self._verdict.movable is not None:
            self._verdict.movable -= sequences

    def avoided(self, now_s: float) -> bool:
        """Slow, and no probe is due."""
        return self._verdict is not None and now_s < self._verdict.probe_at_s

    def picked(self, now_s: float) -> bool:
        """A request goes there; when a probe is due, this is it. Whether it is."""
        verdict = self._verdict
        if verdict is None or now_s < verdict.probe_at_s:
            return False
        verdict.waited_s = verdict.probe_wait_s
        verdict.probe_wait_s = min(2 * verdict.probe_wait_s, self._rules.longest_probe_s)
        verdict.probe_at_s = now_s + verdict.probe_wait_s
        self._row = 0
        if verdict.movable is not None:
            verdict.movable += 1
        return True

    def unpicked(self, now_s: float) -> None:
        """The probe was not sent after all, or has got nothing: the next request is, unless steps have shown enough."""
        verdict = self._verdict
        if verdict is not None and self._row < self._rules.much_steps:
            verdict.probe_wait_s, verdict.probe_at_s = verdict.waited_s or verdict.probe_wait_s, now_s

    def acquit(self) -> None:
        self._verdict = None
        self._peers.slow.discard(self)
        self._peers.convicted.discard(self)

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
        self.median_s = pace_s = _upper_median(self._seconds)
        others_s = self._others(now_s)
        if others_s is not None:
            self._much_s = max(rules.floor_s, rules.much_factor * others_s)
        if self._verdict is not None:
            self._review(self._verdict, pace_s, others_s, now_s)
        elif others_s is not None and pace_s > max(rules.floor_s, rules.slow_factor * others_s):
            self._convict(pace_s, _upper_median(self._counts), rules.slow_factor, now_s)
            if self._verdict is not None:
                self._verdict.much = pace_s > max(rules.floor_s, rules.much_factor * self._verdict.others_s)

    def _review(self, verdict: _Verdict, pace_s: float, all_s: float | None, now_s: float) -> None:
        """It may have recovered. Without peers that are as loaded, what it was compared with last still holds.

        Where peers are drawn by lot it is compared with those of its verdict, for as long as half of them tell and one
        is as loaded: others might be slow themselves, and acquit it. Nor does it stay slow where most of all are,
        whose median is ``all_s``: then those of its verdict were the lucky ones.
        """
        rules, peers, sequences = self._rules, self._peers, _upper_median(self._counts)
        alike, drawn = list[float](), self._drawn
        if drawn:
            verdict.peers = tuple(p for p in verdict.peers if p in peers.paces and now_s - p.heard_s <= rules.fresh_s)
            if len(verdict.peers) >= rules.much_peers // 2:
                alike = _as_loaded(verdict.peers, sequences)
        if not alike:
            verdict.peers = self._some_peers(now_s)
            alike = _as_loaded(verdict.peers, sequences)
        if alike:
            verdict.others_s = _upper_median(alike)
        self._much_s = max(rules.floor_s, rules.much_factor * verdict.others_s)
        verdict.much = pace_s > self._much_s
        measure_s = max(verdict.others_s, all_s) if drawn and all_s is not None else verdict.others_s
        if pace_s <= max(rules.floor_s, rules.recovered_factor * measure_s):
            self.acquit()

    def _judge_row(self, now_s: float) -> None:
        """A few steps in a row were much slower than the others' median was: that may be verdict enough."""
        self._row = 0
        own, counts = self.last_steps(), self.last_counts()
        self._convict(min(own), _upper_median(counts), self._rules.much_factor, now_s)
        if self.slow:  # what was before says nothing any more: neither of its recovery, nor of what is better moved
            self._seconds.clear()
            self._seconds.extend(own)
            self._counts.clear()
            self._counts.extend(counts)
            self._unjudged = 0

    def _convict(self, pace_s: float, sequences: int, factor: float, now_s: float) -> None:
        """Unless too many are slow already, or its load explains it, or what slows it down slows the others, too.

        A machine that stood still, for instance, shows in the last few steps of all, and only later in their medians.
        """
        rules, peers = self._rules, self._peers
        alike, other = [], []
        compared = self._some_peers(now_s)
        for pace in compared:
            seconds, lighter = _upper_median(pace.last_steps()), pace.lighter(sequences)
            if lighter:
                other.append((lighter, lighter * seconds))
            else:
                alike.append(seconds)
        last = alike
        if len(alike) < (rules.alike_drawn if self._drawn else 1):
            last = [*alike, *(scaled_s for _, scaled_s in sorted(other)[: (len(other) + 1) // 2])]
        if not last or pace_s <= max(rules.floor_s, factor * (others_s := _upper_median(last))):
            return
        peers.slow.add(self)
        if self._excess() > 0:
            peers.slow.discard(self)
        else:
            self._verdict = _Verdict(others_s, compared, now_s + rules.first_probe_s, rules.first_probe_s)
            peers.convicted.add(self)

    @property
    def _drawn(self) -> bool:
        """Whether a verdict is checked against some only."""
        return len(self._peers.paces) > self._rules.much_peers + 1

    def _some_peers(self, now_s: float) -> tuple[Pace, ...]:
        """Those that a verdict is checked against."""
        some = self._peers.some(self._rules.much_peers + 1)
        fresh = (p for p in some if p is not self and now_s - p.heard_s <= self._rules.fresh_s)
        return tuple(islice(fresh, self._rules.much_peers))

    def lighter(self, sequences: int) -> float:
        """How many times as many as in its last steps half of ``sequences`` are; 0 where they are no more."""
        half, own = sequences / 2, max(1, _upper_median(self.last_counts()))
        return half / own if half > own else 0.0

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

    def __init__(self, rules: SlownessRules | None = None, rng: random.Random | None = None) -> None:
        self._rules = rules or SlownessRules()
        self._rng = rng or random.Random(0)  # noqa: S311 - draws whom to compare with
        self._models: dict[str, _Peers] = {}
        self._paces: dict[Incarnation, Pace] = {}
        self.convicted: set[Pace] = set()  # found slow and not recovered; for whoever asks to read

    def came_up(self, incarnation: Incarnation) -> Pace:
        """The pace to be fed from now on; what was known of an earlier session is forgotten."""
        self.went_down(incarnation)
        peers = self._models.setdefault(incarnation.replica.model, _Peers(self.convicted, self._rng))
        pace = self._paces[incarnation] = Pace(peers, self._rules)
        peers.paces.add(pace)
        return pace

    def went_down(self, incarnation: Incarnation) -> None:
        pace = self._paces.pop(incarnation, None)
        if pace is None:
            return
        pace.leave()
        peers = self._models[incarnation.replica.model]
        if not peers.paces:
            peers.gathered.clear()
            del self._models[incarnation.replica.model]

    def picked(self, incarnation: Incarnation, now_s: float) -> bool:
        """A request goes there; when a probe is due, this is it. Whether it is."""
        pace = self._paces.get(incarnation)
        return pace is not None and pace.picked(now_s)

    def unpicked(self, incarnation: Incarnation, now_s: float) -> None:
        """The probe was not sent after all: the next request is."""
        pace = self._paces.get(incarnation)
        if pace is not None:
            pace.unpicked(now_s)

    def slow(self, incarnation: Incarnation, now_s: float) -> bool:
        """Whether new work should rather go elsewhere."""
        pace = self._paces.get(incarnation)
        return pace is not None and pace.avoided(now_s)


def _as_loaded(paces: Iterable[Pace], sequences: int) -> list[float]:
    """The medians of those who have at least half of ``sequences``."""
    return [pace.median_s for pace in paces if pace.median_s is not None and not pace.lighter(sequences)]


def _upper_median(values: Collection[_Number]) -> _Number:
    return sorted(values)[len(values) // 2]


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
