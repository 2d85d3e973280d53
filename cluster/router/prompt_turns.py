"""Whose prompt is tokenized next, which ones are refused when too much waits, and how long that takes. Pure.

Higher priorities go first, strictly. Within one priority, tenants with something waiting stand in a ring; each turn
takes the oldest prompt that fits of the first tenant that has one, who then stands last. So the oldest prompt of a
tenant waits for at most one of each other tenant.

When more than ``waiting_max`` would wait, others make room for a newcomer: of the lowest priority first, and there the
youngest of the tenant with the most. Within the newcomer's own priority only as long as that tenant has more than the
newcomer's would have, and never of a higher one. Where that is not enough the newcomer is refused. So nobody gets room
by sending more, and who was refused cannot have the room back by trying again.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Prompt = TypeVar("Prompt")
NEWEST_SHARE = 0.2  # of the mean pace, for what was measured last
SURE_AFTER = 4  # finished prompts before the pace says anything
FORGOTTEN_AFTER_S = 30.0  # since the last one: a pace that refuses everybody would never be measured again
LEAST_S = 1e-3  # what takes less says little about a character


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt stands. ``size`` is what ``waiting_max`` bounds, ``work`` what it costs a thread."""

    tenant: str = ""
    priority: int = 0
    size: int = 1
    work: int = 1


class PromptTurns(Generic[Prompt]):
    """Prompts, each once and hashable, that wait for a thread; a tenant with nothing waiting leaves no trace."""

    def __init__(self, waiting_max: int) -> None:
        assert waiting_max > 0, "somebody must be able to wait"
        self._waiting_max = waiting_max
        self._rings: dict[int, _Ring[Prompt]] = {}  # by priority
        self._priorities: list[int] = []  # of the rings, rising
        self._places: dict[Prompt, Place] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, prompt: Prompt, place: Place) -> list[Prompt]:
        """Who does not wait (any more) because of this: nobody, other prompts, or ``prompt`` alone.

        O(priorities) while there is room, else O(tenants that wait) for each one that leaves.
        """
        assert prompt not in self._places, "a prompt waits twice"
        assert 0 < place.size <= self._waiting_max, "such a prompt could never wait"
        leaving = self._makes_room(place)
        if leaving is None:
            return [prompt]
        for one in leaving:
            self.discard(one)
        ring = self._rings.get(place.priority)
        if ring is None:
            ring = self._rings[place.priority] = _Ring()
            insort(self._priorities, place.priority)
        ring.add(prompt, place)
        self._places[prompt] = place
        self._waiting += place.size
        return leaving

    def next(self, largest: int | None = None) -> Prompt | None:
        """Takes whose turn it is; None when nobody waits.

        With ``largest``, prompts of more work are passed by and wait on; tenants with no other keep their places.
        """
        for priority in reversed(self._priorities):
            prompt = self._rings[priority].turn(largest)
            if prompt is not None:
                self.discard(prompt)
                return prompt
        return None

    def discard(self, prompt: Prompt) -> None:
        """It waits no more, if it did."""
        place = self._places.pop(prompt, None)
        if place is None:
            return
        ring = self._rings[place.priority]
        ring.remove(prompt, place)
        self._waiting -= place.size
        if not ring.lines:
            del self._rings[place.priority]
            self._priorities.remove(place.priority)

    def ahead(self, tenant: str, priority: int, largest: int | None = None) -> int:
        """The work taken before one more prompt of ``tenant``, if nobody else comes; as ``next(largest)`` takes it."""
        higher = sum(self._rings[other].work(largest) for other in self._priorities if other > priority)
        ring = self._rings.get(priority)
        return higher if ring is None else higher + ring.ahead(tenant, largest)

    def _makes_room(self, place: Place) -> list[Prompt] | None:
        """Those whose leaving makes room for one more there; None: not enough of them."""
        missing = self._waiting + place.size - self._waiting_max
        leaving: list[Prompt] = []
        for priority in self._priorities:
            if missing <= 0 or priority > place.priority:
                break
            ring = self._rings[priority]
            keeps = ring.sizes.get(place.tenant, 0) + place.size if priority == place.priority else 0
            for prompt, size in ring.youngest_of_most(keeps):
                leaving.append(prompt)
                missing -= size
                if missing <= 0:
                    break
        return leaving if missing <= 0 else None

    def check(self) -> None:
        """Every invariant, for tests."""
        assert self._waiting == sum(place.size for place in self._places.values()), "what waits is miscounted"
        assert self._waiting <= self._waiting_max, "more waits than may"
        assert self._priorities == sorted(self._rings), "the priorities are out of order"
        found: dict[Prompt, Place] = {}
        for priority, ring in self._rings.items():
            assert ring.lines, "a priority without anything waiting is kept"
            assert all(ring.lines.values()), "a tenant without anything waiting is kept"
            sizes = {tenant: sum(place.size for place in line.values()) for tenant, line in ring.lines.items()}
            assert ring.sizes == sizes, "what a tenant has is miscounted"
            for tenant, line in ring.lines.items():
                assert all((p.tenant, p.priority) == (tenant, priority) for p in line.values()), "the wrong line"
                found.update(line)
        assert found == self._places, "the lines hold other prompts"


class _Ring(Generic[Prompt]):
    """What waits with one priority. ``lines``: the prompts by tenant, whose turn is next first; ``sizes`` of these."""

    __slots__ = ("lines", "sizes")

    def __init__(self) -> None:
        self.lines: OrderedDict[str, OrderedDict[Prompt, Place]] = OrderedDict()
        self.sizes: dict[str, int] = {}

    def add(self, prompt: Prompt, place: Place) -> None:
        self.lines.setdefault(place.tenant, OrderedDict())[prompt] = place
        self.sizes[place.tenant] = self.sizes.get(place.tenant, 0) + place.size

    def remove(self, prompt: Prompt, place: Place) -> None:
        line = self.lines[place.tenant]
        del line[prompt]
        self.sizes[place.tenant] -= place.size
        if not line:
            del self.lines[place.tenant], self.sizes[place.tenant]

    def turn(self, largest: int | None) -> Prompt | None:
        """The prompt whose turn it is; its tenant stands last then."""
        for tenant, line in self.lines.items():
            for prompt, place in line.items():
                if largest is None or place.work <= largest:
                    self.lines.move_to_end(tenant)
                    return prompt
        return None

    def work(self, largest: int | None) -> int:
        return sum(sum(_works(line.values(), largest)) for line in self.lines.values())

    def ahead(self, tenant: str, largest: int | None) -> int:
        """The work taken before one more of ``tenant``: all of its own, and as many of each other tenant.

        One more of those that stand before it in the ring, which is all of them while it does not stand there.
        """
        own = _works(self.lines.get(tenant, OrderedDict()).values(), largest)
        ahead, turns = sum(own), len(own) + 1
        for other, line in self.lines.items():
            if other == tenant:
                turns -= 1
            else:
                ahead += sum(_works(line.values(), largest)[:turns])
        return ahead

    def youngest_of_most(self, keeps: int) -> Iterator[tuple[Prompt, int]]:
        """With their sizes, the youngest of whoever has most then, while that is more than ``keeps``.

        Of several tenants with the most, the one whose turn comes last.
        """
        sizes = {tenant: self.sizes[tenant] for tenant in reversed(self.lines)}
        youngest = {tenant: reversed(line.items()) for tenant, line in self.lines.items()}
        while sizes[most := max(sizes, key=sizes.__getitem__)] > keeps:
            prompt, place = next(youngest[most])
            sizes[most] -= place.size
            yield prompt, place.size


def _works(places: Iterable[Place], largest: int | None) -> list[int]:
    return [place.work for place in places if largest is None or place.work <= largest]


class Pace:
    """How much work one thread does in a second: a mean in which the newest counts most. Times are a clock's seconds.

    The mean is of paces, not of seconds, so one prompt during which the machine stood still does not say much.
    """

    def __init__(self) -> None:
        self._mean = 0.0
        self._finished = 0
        self._last_s = -math.inf

    def finished(self, work: int, seconds: float, now_s: float) -> None:
        if now_s - self._last_s > FORGOTTEN_AFTER_S:
            self._finished = 0
        self._finished += 1
        self._last_s = now_s
        share = max(NEWEST_SHARE, 1 / self._finished)  # the first ones count alike
        self._mean += share * (work / max(seconds, LEAST_S) - self._mean)

    def per_second(self, now_s: float) -> float | None:
        """None: not known (any more)."""
        known = self._finished >= SURE_AFTER and now_s - self._last_s <= FORGOTTEN_AFTER_S
        return self._mean if known else None


def wait_for_thread(ahead: float, left: Iterable[float]) -> float:
    """Work that each thread does until one of them is free, with ``ahead`` done first; ``left`` is what each is at.

    As if prompts could be cut into pieces, so it is a little less than it will be; infinite without threads.
    """
    # As many threads share what is ahead as have less left than the result: any other number would make it larger.
    wait, together = math.inf, ahead
    for threads, one in enumerate(sorted(left), 1):
        together += one
        wait = min(wait, together / threads)
    return wait
