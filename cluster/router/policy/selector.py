"""How a profile is applied: to candidates that are at hand, or to a group of any size. Pure, given its chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from cluster.domain.block_hash import LeadingNames
from cluster.domain.ids import Incarnation
from cluster.router.endpoint_table import Candidate
from cluster.router.holders import Holders
from cluster.router.policy.contracts import Choice, Demand, Filter, Profile, Turn
from cluster.router.policy.filters import NOT_EJECTED, NOT_FAILED, NOT_FULL
from cluster.router.policy.group import Group, Member

ONLY = "only"
LOOKED_MAX = 128  # members, as long as one of them qualifies; when none does, all are looked at


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a profile thinks of one endpoint.

    ``filters``: each one's name, and whether it lets the endpoint pass (also of those that stepped aside).
    ``qualifies``: nothing keeps it out. ``scores``: each scorer's name, weight and number, as among all who qualify;
    of one that is kept out, as if nobody were. ``looked_at``: a pick would get as far as this one. ``taken``: it would
    be the one.
    """

    candidate: Candidate
    filters: tuple[tuple[str, bool], ...]
    qualifies: bool
    scores: tuple[tuple[str, float, float], ...]
    total: float
    looked_at: bool = False
    taken: bool = False


class Selector:
    """The picks of one router by one profile: the same seed and demands give the same picks."""

    def __init__(self, profile: Profile, rng: random.Random) -> None:
        self.profile = profile
        self._rng = rng
        self._turns: dict[str, Turn] = {}
        self._required = tuple(f for f in profile.filters if f.required and not f.static)
        self._optional = tuple(f for f in profile.filters if not f.required)
        self._sound = tuple(f for f in self._optional if f not in (NOT_FAILED, NOT_FULL))

    def choose(self, group: Group, demand: Demand, holders: Holders) -> Choice | None:
        """The endpoint of ``group`` that gets ``demand``; None when none qualifies."""
        turn = self._turns.setdefault(demand.model, Turn())
        if len(group) == 1:
            return self._only(group, demand, holders)
        found = self._look(group, demand, holders, turn, self._rng)
        if not found:
            return None
        choice = decide(self.profile, [candidate for candidate, _ in found], demand, self._rng)
        turn.position = 1 + next(position for candidate, position in found if candidate is choice.candidate)
        return choice

    def _only(self, group: Group, demand: Demand, holders: Holders) -> Choice | None:
        """As ``choose`` where there is no choice: who is alone is needed, whatever filters that step aside say."""
        member = group.members[0]
        has_room = member.has_room
        if demand.needs_room and not has_room:
            return None
        names = demand.blocks.leading(group.block_size) if demand.blocks is not None and holders.depth else None
        candidate = _candidate(member, names, holders, has_room=has_room, at_home=False)
        if not _passes(candidate, demand, self._required):
            return None
        return decide(self.profile, (candidate,), demand, self._rng)

    def explain(self, group: Group, others: Sequence[Member], demand: Demand, holders: Holders) -> list[Verdict]:
        """The verdicts on every member, and on ``others`` that the static filters keep out; moves nothing.

        Members are in the walk's order. O(endpoints).
        """
        turn = Turn(self._turns.get(demand.model, Turn()).position)
        order = list(dict.fromkeys(self.profile.walk(group, demand, holders, turn, self._copied_rng())))
        home = _home(group, demand, holders) if self.profile.uses_homes and len(group) > 1 else None
        names = demand.blocks.leading(group.block_size) if demand.blocks is not None and holders.depth else None
        members = [
            _candidate(member, names, holders, has_room=member.has_room, at_home=position == home)
            for position, member in ((position, group.members[position]) for position in order)
        ]
        left_out = [_candidate(one, names, holders, has_room=one.has_room, at_home=False) for one in others]
        everybody = (*members, *left_out)
        rng = self._copied_rng()
        looked_at = [candidate for candidate, _ in self._look(group, demand, holders, turn, rng)]
        choice = decide(self.profile, looked_at, demand, rng) if looked_at else None
        qualified = _scores(self.profile, _filtered(everybody, demand, self.profile.filters), demand)
        scores = _scores(self.profile, everybody, demand) | qualified
        seen = {candidate.endpoint.incarnation for candidate in looked_at}
        taken = None if choice is None else choice.candidate.endpoint.incarnation
        verdicts = []
        for candidate in everybody:
            incarnation = candidate.endpoint.incarnation
            verdicts.append(
                Verdict(
                    candidate,
                    filters=tuple((rule.name, rule.keep(candidate, demand)) for rule in self.profile.filters),
                    qualifies=incarnation in qualified,
                    scores=scores[incarnation],
                    total=sum(weight * score for _, weight, score in scores[incarnation]),
                    looked_at=incarnation in seen,
                    taken=incarnation == taken,
                )
            )
        return verdicts

    def _copied_rng(self) -> random.Random:
        """Draws what ours would, without moving it."""
        copied = random.Random()  # noqa: S311 - gets the state of ours
        copied.setstate(self._rng.getstate())
        return copied

    def _look(
        self, group: Group, demand: Demand, holders: Holders, turn: Turn, rng: random.Random
    ) -> list[tuple[Candidate, int]]:
        """The first ``enough`` in the walk's order that pass every filter, with their positions.

        Where there is none: one that broke under this request and is sound again; or else who is left when filters that
        are not required step aside one by one. Not for want of room: a request that could soon have a sound member
        waits for it, rather than go to a slow one now, unless it settles for that.
        """
        found: list[tuple[Candidate, int]] = []
        spare: list[tuple[Candidate, int]] = []
        seen: set[int] = set()
        members = group.members
        names = demand.blocks.leading(group.block_size) if demand.blocks is not None and holders.depth else None
        home = _home(group, demand, holders) if self.profile.uses_homes and len(group) > 1 else None
        walk = self.profile.walk(group, demand, holders, turn, rng)
        for position in walk if home is None else chain((home,), walk):
            if position in seen:
                continue
            if len(seen) >= LOOKED_MAX and found:
                break
            seen.add(position)
            has_room = members[position].has_room
            if demand.needs_room and not has_room:
                continue  # nine of ten cost no more than this when a large fleet is nearly full
            candidate = _candidate(members[position], names, holders, has_room=has_room, at_home=position == home)
            if not _passes(candidate, demand, self._required):
                continue
            if _passes(candidate, demand, self._optional):
                found.append((candidate, position))
                if len(found) == self.profile.enough:
                    break
            else:
                spare.append((candidate, position))
        if found or not spare:
            return found
        sound = [one for one in spare if _passes(one[0], demand, self._sound)]
        if not sound and demand.needs_room and self._sound_but_full(group, demand):
            spare = [one for one in spare if demand.settles and NOT_EJECTED.keep(one[0], demand)]
        left = _filtered([candidate for candidate, _ in sound or spare], demand, self._optional)
        kept = {id(candidate) for candidate in left}
        return [(candidate, position) for candidate, position in spare if id(candidate) in kept]

    def _sound_but_full(self, group: Group, demand: Demand) -> bool:
        """Whether some member without room would pass every filter if it had some."""
        rules = (*self._required, *self._sound)
        full = (member.candidate(has_room=True) for member in group.members if not member.has_room)
        return any(_passes(candidate, demand, rules) for candidate in full)


def choose(profile: Profile, candidates: Sequence[Candidate], demand: Demand, rng: random.Random) -> Choice | None:
    """What ``profile`` takes for ``demand`` when it looks at all ``candidates``; None when none qualifies."""
    left = _filtered(candidates, demand, profile.filters)
    return decide(profile, left, demand, rng) if left else None


def decide(profile: Profile, left: Sequence[Candidate], demand: Demand, rng: random.Random) -> Choice:
    """The best of ``left``, who all qualify; there is at least one.

    The scorer that spoke loudest is the one that holds the taken one highest above the mean of all.
    """
    if len(left) == 1:
        return Choice(left[0], profile.scorers[0][0].name if profile.enough == 1 else ONLY)
    columns = [(scorer.name, [weight * s for s in scorer.score(left, demand)]) for scorer, weight in profile.scorers]
    totals = [sum(scores[index] for _, scores in columns) for index in range(len(left))]
    taken = profile.picker(totals, rng)
    loudest = max(columns, key=lambda column: column[1][taken] - sum(column[1]) / len(left))[0]
    return Choice(left[taken], loudest)


def _scores(
    profile: Profile, left: Sequence[Candidate], demand: Demand
) -> dict[Incarnation, tuple[tuple[str, float, float], ...]]:
    if not left:
        return {}
    columns = [(scorer.name, weight, scorer.score(left, demand)) for scorer, weight in profile.scorers]
    return {
        candidate.endpoint.incarnation: tuple((name, weight, column[index]) for name, weight, column in columns)
        for index, candidate in enumerate(left)
    }


def _filtered(candidates: Sequence[Candidate], demand: Demand, rules: Sequence[Filter]) -> list[Candidate]:
    left = list(candidates)
    for rule in rules:
        kept = [candidate for candidate in left if rule.keep(candidate, demand)]
        if kept or rule.required:
            left = kept
    return left


def _home(group: Group, demand: Demand, holders: Holders) -> int | None:
    """Where all routers begin to cache this prompt, without talking to each other: its home on the ring.

    The key is its first block that nobody holds. So a new system prompt has one home, and the conversations that share
    an old one have many.
    """
    if demand.blocks is None or not group.block_size:
        return None
    names = demand.blocks.leading(group.block_size)
    return group.ring.home(names[holders.depth]) if holders.depth < len(names) else None


def _passes(candidate: Candidate, demand: Demand, rules: Sequence[Filter]) -> bool:
    for rule in rules:  # noqa: SIM110 - quicker than all(), for every endpoint that a pick looks at
        if not rule.keep(candidate, demand):
            return False
    return True


def _candidate(
    member: Member, names: LeadingNames | None, holders: Holders, *, has_room: bool, at_home: bool
) -> Candidate:
    blocks = 0 if names is None else holders.get(member.incarnation, 0)
    cached_tokens = names.cached_tokens(blocks) if blocks and names is not None else 0
    return member.candidate(cached_tokens, has_room=has_room, at_home=at_home)
