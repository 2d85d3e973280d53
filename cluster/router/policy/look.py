"""Whom one pick gets to see of a group of any size, and who of them qualifies. Pure, given its chance."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from cluster.domain.block_hash import LeadingNames
from cluster.domain.ids import Incarnation
from cluster.router.endpoint_table import Candidate
from cluster.router.holders import Holders
from cluster.router.policy.contracts import Demand, Filter, Profile, Turn
from cluster.router.policy.filters import NOT_EJECTED, NOT_FAILED, NOT_FULL
from cluster.router.policy.group import Group, Member

LOOKED_MAX = 128  # members, as long as one of them qualifies: a group of up to so many is seen whole
WALKED_MAX = 512  # members, as long as none qualifies and few are spare: then all tell at once whether they have room
IN_VAIN_MAX = 64  # candidates of a larger group that may be built and not qualify
SPARES_MAX = 24  # of a larger group, who pass the required filters only: no more are built of whom something is known
NOBODY = -1  # the best rank of none
ASKED_AGAIN = 16  # of those that were unsound when they were last asked, when nobody else is found


class Left(NamedTuple):
    """Who qualifies, with their positions; and the filters that are not required but do not step aside this time."""

    members: list[tuple[Candidate, int]]
    held: tuple[Filter, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """The filters of a profile that are asked at every pick; ``sound``: those that no demand has a say in."""

    required: tuple[Filter, ...]
    optional: tuple[Filter, ...]
    sound: tuple[Filter, ...]

    @classmethod
    def of(cls, profile: Profile) -> Rules:
        optional = tuple(f for f in profile.filters if not f.required)
        return cls(
            required=tuple(f for f in profile.filters if f.required and not f.static),
            optional=optional,
            sound=tuple(f for f in optional if f not in (NOT_FAILED, NOT_FULL)),
        )


def look(
    profile: Profile,
    rules: Rules,
    group: Group,
    demand: Demand,
    holders: Holders,
    turn: Turn,
    rng: random.Random,
    *,
    everybody: bool = False,
) -> Left:
    """The first ``enough`` in the walk's order that pass every filter.

    Where there is none: one that broke under this request and is sound again; or else who is left when filters that
    are not required step aside one by one. Not for want of room: a request that could soon have a sound member waits
    for it, rather than go to a slow one now, unless it settles for that.

    Exact for up to LOOKED_MAX members. Of more, who was unsound when last asked counts as that (``turn.doubted``): a
    pick that finds nobody sound soon asks a few of them again, so that a recovery is noticed within some picks; and of
    the unsound some two dozen are compared. Nor does a pick go on when IN_VAIN_MAX candidates were built and none was
    sound: right after many have become unsound at once, some picks may miss the sound ones that are left.
    With ``everybody`` it is exact for any number, remembers nothing, and ``enough`` does not bound it.
    """
    home = home_of(group, demand, holders) if profile.uses_homes and len(group) > 1 else None
    enough = len(group) + 1 if everybody else profile.enough
    limit = len(group) if everybody else LOOKED_MAX
    glance = _Glance(rules, group, demand, holders, turn.doubted if len(group) > limit else None, home)
    members, seen, found, spare, doubted = group.members, glance.seen, glance.found, glance.spare, glance.doubted
    passed_over: list[int] = []
    walk = profile.walk(group, demand, holders, turn, rng)
    if home is not None:
        walk = chain((home,), walk)
    for position in walk:
        if position in seen:
            continue
        if (len(seen) >= limit and (found or len(spare) >= SPARES_MAX or len(seen) >= WALKED_MAX)) or (
            len(spare) >= SPARES_MAX and glance.in_vain
        ):
            walk = chain((position,), walk)
            break
        seen.add(position)
        has_room = members[position].has_room
        if demand.needs_room and not has_room:
            continue  # nine of ten cost no more than this when a large fleet is nearly full
        if len(spare) >= SPARES_MAX and members[position].incarnation in doubted:
            passed_over.append(position)
            continue
        glance.ask(position, has_room=has_room)
        if len(found) == enough:
            break
    if found:
        return Left(found)
    if len(group) <= limit:
        return glance.conclude()
    seen.difference_update(passed_over)
    return glance.search(walk, enough, rng)


def home_of(group: Group, demand: Demand, holders: Holders) -> int | None:
    """Where all routers begin to cache this prompt, without talking to each other: its home on the ring.

    The key is its first block that nobody holds. So a new system prompt has one home, and the conversations that share
    an old one have many.
    """
    if demand.blocks is None or not group.block_size:
        return None
    names = demand.blocks.leading(group.block_size)
    return group.ring.home(names[holders.depth]) if holders.depth < len(names) else None


def filtered(candidates: Sequence[Candidate], demand: Demand, rules: Sequence[Filter]) -> list[Candidate]:
    """Who is left of ``candidates``; rules that are not required step aside, one by one, where nobody would be."""
    left = list(candidates)
    for rule in rules:
        kept = [candidate for candidate in left if rule.keep(candidate, demand)]
        if kept or rule.required:
            left = kept
    return left


def passes(candidate: Candidate, demand: Demand, rules: Sequence[Filter]) -> bool:
    for rule in rules:  # noqa: SIM110 - quicker than all(), for every endpoint that a pick looks at
        if not rule.keep(candidate, demand):
            return False
    return True


def candidate_of(
    member: Member, names: LeadingNames | None, holders: Holders, *, has_room: bool, at_home: bool
) -> Candidate:
    """``member``, with what is thought to be cached there of the prompt whose blocks ``names`` are."""
    blocks = 0 if names is None else holders.get(member.incarnation, 0)
    cached_tokens = names.cached_tokens(blocks) if blocks and names is not None else 0
    return member.candidate(cached_tokens, has_room=has_room, at_home=at_home)


class _Glance:
    """What one look has found so far.

    ``found`` pass every filter, ``spare`` only those that are required; ``seen`` are the positions of those that were
    asked or are full. ``doubted`` is what ``Turn`` says, and stays empty where nobody is to be remembered (None).
    """

    __slots__ = (
        "_asked_again", "_best", "_built", "_demand", "_group", "_holders", "_home", "_in_vain_max", "_names",
        "_others", "_remembers", "_roomy", "_rules", "_strangers", "doubted", "found", "seen", "spare",
    )  # fmt: skip

    def __init__(
        self,
        rules: Rules,
        group: Group,
        demand: Demand,
        holders: Holders,
        doubted: dict[Incarnation, int] | None,
        home: int | None,
    ) -> None:
        self._rules, self._group, self._demand, self._holders, self._home = rules, group, demand, holders, home
        self._names = demand.blocks.leading(group.block_size) if demand.blocks is not None and holders.depth else None
        self._in_vain_max = IN_VAIN_MAX if doubted is not None else len(group)
        self._strangers: Sequence[int] = range(len(group))  # all but those of whom it is known that they are unsound
        self._roomy: list[int] = []  # those of them who have room, once it is searched
        self._asked_again: list[int] = []  # or left alone as they are full: what was known of them is forgotten
        self._others: list[int] | None = None  # who may be asked, once somebody wants to know
        self._built = 0
        self._best = NOBODY
        self._remembers = doubted is not None
        self.doubted: dict[Incarnation, int] = {} if doubted is None else doubted
        self.found: list[tuple[Candidate, int]] = []
        self.spare: list[tuple[Candidate, int]] = []
        self.seen: set[int] = set()

    @property
    def in_vain(self) -> bool:
        """Whether no more is to be asked, as nobody is found so far."""
        return self._built >= self._in_vain_max

    def ask(self, position: int, *, has_room: bool) -> None:
        """Builds the candidate and notes what it is good for."""
        member, demand, rules = self._group.members[position], self._demand, self._rules
        candidate = candidate_of(member, self._names, self._holders, has_room=has_room, at_home=position == self._home)
        self._built += 1
        if not passes(candidate, demand, rules.required):
            return
        if passes(candidate, demand, rules.optional):
            self.found.append((candidate, position))
            if self.doubted:
                self.doubted.pop(member.incarnation, None)
            return
        rank = self._rank(candidate)
        self._best = max(self._best, rank)
        self.spare.append((candidate, position))
        if self._remembers:
            self._remember(candidate, rank)

    def search(self, walk: Iterator[int], enough: int, rng: random.Random) -> Left:
        """Goes on where the first of a walk were no good: only who may be some good is asked from here on.

        Who has room is asked about all at once, or all strangers: that takes a third of what a walk's step takes for
        each.
        """
        members, doubted = self._group.members, self.doubted
        if 2 * len(doubted) >= len(members):
            self._strangers = [p for who, p in self._group.positions.items() if who not in doubted]
            self._roomy = [p for p in self._strangers if members[p].has_room]
        else:
            self._roomy = [position for position, member in enumerate(members) if member.has_room]
        if not (self.spare or self._who_may_be_asked()):
            return Left([])
        if not self.in_vain or len(self._roomy) <= enough + len(self.seen) + len(doubted):  # else too many are unknown
            unknown = self._unknown()
            if len(unknown) <= enough:  # their order says nothing
                for position in sorted(unknown):
                    self._see(position)
            else:
                self._follow(walk, unknown)
        if not (self.found or self.in_vain):
            self._ask_again()
        return Left(self.found) if self.found else self.conclude(rng)

    def conclude(self, rng: random.Random | None = None) -> Left:
        """Who qualifies where nobody found so far passes every filter.

        Some of those who may be asked are asked as well, given ``rng``; all of them equally often.
        """
        demand, rules = self._demand, self._rules
        held: tuple[Filter, ...] = ()
        if not (self.spare or rng is not None):
            return Left([])
        if self._best < len(rules.sound):
            if demand.needs_room and self._sound_but_full():
                held = (NOT_EJECTED,) if demand.settles else rules.sound
                if not demand.settles:
                    return Left([], held)
            if rng is not None:
                self._top_up(rng)
            if self.found:
                return Left(self.found)
        kept = [one for one in self.spare if passes(one[0], demand, held)]
        left = {id(candidate) for candidate in filtered([one[0] for one in kept], demand, rules.optional)}
        return Left([one for one in kept if id(one[0]) in left], held)

    def _unknown(self) -> set[int]:
        """Strangers with room who are yet to be asked."""
        members, positions, doubted = self._group.members, self._group.positions, self.doubted
        unasked = set(self._roomy).difference(self.seen)
        if len(self._strangers) < len(members):  # those with room are strangers already
            return unasked
        if len(unasked) <= len(doubted):
            return {position for position in unasked if members[position].incarnation not in doubted}
        return unasked.difference(positions[who] for who in doubted if who in positions)

    def _see(self, position: int) -> None:
        self.seen.add(position)
        self.ask(position, has_room=self._group.members[position].has_room)

    def _ask_again(self) -> None:
        """Those whose last answers are the oldest, so that every recovery is noticed in the end."""
        for incarnation in tuple(islice(self.doubted, ASKED_AGAIN)):
            self.doubted.pop(incarnation, None)  # who has left may have been forgotten meanwhile
            position = self._group.positions.get(incarnation)
            if position is None:
                continue
            self._asked_again.append(position)
            if position in self.seen:
                continue
            if self._group.members[position].has_room or not self._demand.needs_room:
                self._see(position)

    def _follow(self, walk: Iterator[int], unknown: set[int]) -> None:
        """Asks those who are ``unknown``, in the order of ``walk``, until one of them is found."""
        for position in walk:
            if position in unknown:
                if self.in_vain:
                    return
                unknown.discard(position)
                self._see(position)
                if self.found:
                    return

    def _who_may_be_asked(self) -> Sequence[int]:
        """All, or those who have room where the demand needs some, in order."""
        members = self._group.members
        if not self._demand.needs_room:
            return range(len(members))
        if self._others is None:
            self._others = self._roomy
            if len(self._strangers) < len(members):
                known = set(range(len(members))).difference(self._strangers)
                self._others = sorted((*self._roomy, *(p for p in known if members[p].has_room)))
        return self._others

    def _top_up(self, rng: random.Random) -> None:
        """Asks some where there are few spare ones, or where filters step aside later for these."""
        rules, best = self._rules.sound, self._best if len(self.spare) >= SPARES_MAX else NOBODY
        if best == len(rules) - 1 and self._demand.needs_room:
            return  # only sound ones are better than the best, and there are none
        others = self._who_may_be_asked()
        begin = rng.randrange(len(others)) if others else 0
        members, ranked = self._group.members, list[tuple[int, int]]()
        for position in chain(others[begin:], others[:begin]):
            if position not in self.seen:
                rank = self.doubted.get(members[position].incarnation, len(rules))
                if rank > best:
                    ranked.append((rank, position))
        ranked.sort(key=lambda one: one[0], reverse=True)
        for _, position in ranked[:SPARES_MAX]:
            self._see(position)

    def _sound_but_full(self) -> bool:
        """Whether some member without room would pass every filter if it had some."""
        rules, doubted, members = (*self._rules.required, *self._rules.sound), self.doubted, self._group.members
        left, roomy = self._in_vain_max, set(self._roomy)
        strangers = self._strangers if len(roomy) < len(self._strangers) else ()
        for position in chain(self._asked_again, strangers):
            member = members[position]
            if position in roomy or (doubted and member.incarnation in doubted) or member.has_room:
                continue
            if not left:
                break
            left -= 1
            candidate = member.candidate(has_room=True)
            if passes(candidate, self._demand, rules):
                return True
            if self._remembers:
                self._remember(candidate, self._rank(candidate))
        return False

    def _remember(self, candidate: Candidate, rank: int) -> None:
        """Whether it is sound, for later picks."""
        doubted, incarnation = self.doubted, candidate.endpoint.incarnation
        doubted.pop(incarnation, None)
        if rank < len(self._rules.sound):
            doubted[incarnation] = rank
            if len(doubted) > len(self._group):  # some have left
                for gone in [who for who in doubted if who not in self._group.positions]:
                    del doubted[gone]

    def _rank(self, candidate: Candidate) -> int:
        """How many filters say that it is sound, before the first one that does not."""
        rank = 0
        for rule in self._rules.sound:
            if not rule.keep(candidate, self._demand):
                break
            rank += 1
        return rank
