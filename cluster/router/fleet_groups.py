"""The endpoints that a choice looks at, grouped by model and checkpoint for as long as none comes, goes or changes."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol, cast

from cluster.domain.ids import Incarnation
from cluster.router.endpoint_table import Candidate, Standing
from cluster.router.policy.contracts import Demand, Profile
from cluster.router.policy.group import Group
from cluster.router.session import EngineSession


class Standings(Protocol):
    """Who judges how endpoints behave."""

    def standing(self, incarnation: Incarnation) -> Standing: ...

    def picked(self, incarnation: Incarnation) -> Callable[[], None] | None:
        """A request is on its way there. What takes that back, if there is anything to be taken back."""


class Seat:
    """One session as a policy asks for it."""

    __slots__ = ("_standings", "incarnation", "number", "session")

    def __init__(self, session: EngineSession, standings: Standings, number: int) -> None:
        self.session = session
        self.number = number  # in the order of coming
        self.incarnation = session.endpoint.incarnation
        self._standings = standings

    @property
    def has_room(self) -> bool:
        return self.session.load.has_room

    def candidate(self, cached_tokens: int = 0, *, has_room: bool, at_home: bool = False) -> Candidate:
        session, load = self.session, self.session.load
        return Candidate(
            endpoint=session.endpoint,
            session_up=session.up,
            tokens=load.tokens,
            cached_tokens=cached_tokens,
            has_room=has_room,
            standing=self._standings.standing(self.incarnation),
            queued_tokens=load.queued_tokens,
            at_home=at_home,
        )


class FleetGroups:
    """A seat for every session, and the groups that the static filters of ``profile`` let them into.

    ``changed`` is to be called for every endpoint that has come, gone or changed, after ``seat`` or ``leave``;
    ``clear`` instead, before them, where many have.
    """

    def __init__(self, profile: Profile, standings: Standings) -> None:
        self._standings = standings
        self._rules = tuple(rule.keep for rule in profile.filters if rule.static)
        self._seats: dict[Incarnation, Seat] = {}
        self._seated = 0  # that ever were
        self._groups: dict[tuple[str, str], Group] = {}

    def seat(self, session: EngineSession) -> None:
        self._seats[session.endpoint.incarnation] = Seat(session, self._standings, self._seated)
        self._seated += 1

    def leave(self, incarnation: Incarnation) -> None:
        del self._seats[incarnation]

    def clear(self) -> None:
        self._groups.clear()

    def of(self, demand: Demand) -> Group:
        """Those of the demand's model and checkpoint ("" being any) that take new work, in the order of coming."""
        key = demand.model, demand.checkpoint_digest
        group = self._groups.get(key)
        if group is None:
            asked = Demand(*key)
            group = self._groups[key] = _group_of([seat for seat in self._seats.values() if self._joins(seat, asked)])
        return group

    def others(self, group: Group) -> list[Seat]:
        """Whoever is not in ``group``."""
        inside = group.positions
        return [seat for incarnation, seat in self._seats.items() if incarnation not in inside]

    def changed(self, incarnation: Incarnation) -> None:
        """One endpoint has come, gone or changed: the groups that it joins or leaves are made anew from what they were.

        O(members) for each of them, without asking the others anything.
        """
        seat = self._seats.get(incarnation)
        for key, group in tuple(self._groups.items()):
            if key[0] != incarnation.replica.model:
                continue
            others = [cast("Seat", one) for one in group.members if one.incarnation != incarnation]
            if seat is not None and self._joins(seat, Demand(*key)):
                insort(others, seat, key=attrgetter("number"))
            if others:
                self._groups[key] = _group_of(others)
            else:
                del self._groups[key]

    def _joins(self, seat: Seat, asked: Demand) -> bool:
        """Whether the static filters let it into the group that is ``asked`` for."""
        candidate = Candidate(seat.session.endpoint, seat.session.up)
        for keep in self._rules:  # noqa: SIM110 - quicker than all(), for thousands of endpoints
            if not keep(candidate, asked):
                return False
        return True


def _group_of(seats: Sequence[Seat]) -> Group:
    sizes = {seat.session.endpoint.block_size for seat in seats}
    return Group(seats, sizes.pop() if len(sizes) == 1 else 0)
