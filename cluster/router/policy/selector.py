"""How a profile is applied: to candidates that are at hand, or to a group of any size. Pure, given its chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.domain.ids import Incarnation
from cluster.router.endpoint_table import Candidate
from cluster.router.holders import Holders
from cluster.router.policy.contracts import Choice, Demand, Profile, Turn
from cluster.router.policy.group import Group, Member
from cluster.router.policy.look import Rules, candidate_of, filtered, home_of, look, passes

ONLY = "only"
TURNS_MAX = 256  # models and checkpoints of which something is remembered


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a profile thinks of one endpoint.

    ``filters``: each one's name, whether it lets the endpoint pass (also of those that stepped aside), and whether it
    is required, be it for this demand only, which waits for a sound endpoint. ``qualifies``: nothing keeps it out.
    ``scores``: each scorer's name, weight and number, as among all who qualify; of one that is kept out, as if nobody
    were. ``looked_at``: a pick would get as far as this one. ``taken``: it would be the one.
    """

    candidate: Candidate
    filters: tuple[tuple[str, bool, bool], ...]
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
        self._turns: dict[tuple[str, str], Turn] = {}  # by model and checkpoint, as groups are
        self._rules = Rules.of(profile)

    def choose(self, group: Group, demand: Demand, holders: Holders) -> Choice | None:
        """The endpoint of ``group`` that gets ``demand``; None when none qualifies."""
        if len(group) == 1:
            return self._only(group, demand, holders)
        turn = self._turns.get((demand.model, demand.checkpoint_digest)) or self._new_turn(demand)
        found = look(self.profile, self._rules, group, demand, holders, turn, self._rng).members
        if not found:
            return None
        choice = decide(self.profile, [candidate for candidate, _ in found], demand, self._rng)
        turn.position = 1 + next(position for candidate, position in found if candidate is choice.candidate)
        return choice

    def _new_turn(self, demand: Demand) -> Turn:
        """In the place of the oldest where there are too many: checkpoints come with every update and never return."""
        if len(self._turns) >= TURNS_MAX:
            del self._turns[next(iter(self._turns))]
        turn = self._turns[demand.model, demand.checkpoint_digest] = Turn()
        return turn

    def _only(self, group: Group, demand: Demand, holders: Holders) -> Choice | None:
        """As ``choose`` where there is no choice: who is alone is needed, whatever filters that step aside say."""
        member = group.members[0]
        has_room = member.has_room
        if demand.needs_room and not has_room:
            return None
        names = demand.blocks.leading(group.block_size) if demand.blocks is not None and holders.depth else None
        candidate = candidate_of(member, names, holders, has_room=has_room, at_home=False)
        if not passes(candidate, demand, self._rules.required):
            return None
        return decide(self.profile, (candidate,), demand, self._rng)

    def explain(self, group: Group, others: Sequence[Member], demand: Demand, holders: Holders) -> list[Verdict]:
        """The verdicts on every member, and on ``others`` that the static filters keep out; moves nothing.

        Members are in the walk's order. Who qualifies is said by the code that picks, asked about everybody: of a
        large group, whoever a pick does not get as far as as well. O(endpoints).
        """
        remembered = self._turns.get((demand.model, demand.checkpoint_digest), Turn())
        turn = Turn(remembered.position, dict(remembered.doubted))
        order = list(dict.fromkeys(self.profile.walk(group, demand, holders, turn, self._copied_rng())))
        home = home_of(group, demand, holders) if self.profile.uses_homes and len(group) > 1 else None
        names = demand.blocks.leading(group.block_size) if demand.blocks is not None and holders.depth else None
        members = [
            candidate_of(member, names, holders, has_room=member.has_room, at_home=position == home)
            for position, member in ((position, group.members[position]) for position in order)
        ]
        left_out = [candidate_of(one, names, holders, has_room=one.has_room, at_home=False) for one in others]
        everybody = (*members, *left_out)
        left, held = look(self.profile, self._rules, group, demand, holders, turn, self._copied_rng(), everybody=True)
        required = {rule.name for rule in self.profile.filters if rule.required or rule in held}
        rng = self._copied_rng()
        looked_at = [
            candidate for candidate, _ in look(self.profile, self._rules, group, demand, holders, turn, rng)[0]
        ]
        choice = decide(self.profile, looked_at, demand, rng) if looked_at else None
        seen = {candidate.endpoint.incarnation for candidate in looked_at}
        fit = seen.union(candidate.endpoint.incarnation for candidate, _ in left)
        qualified = _scores(self.profile, [one for one in members if one.endpoint.incarnation in fit], demand)
        scores = _scores(self.profile, everybody, demand) | qualified
        taken = None if choice is None else choice.candidate.endpoint.incarnation
        verdicts = []
        for candidate in everybody:
            incarnation = candidate.endpoint.incarnation
            verdicts.append(
                Verdict(
                    candidate,
                    filters=tuple(
                        (rule.name, rule.keep(candidate, demand), rule.name in required)
                        for rule in self.profile.filters
                    ),
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


def choose(profile: Profile, candidates: Sequence[Candidate], demand: Demand, rng: random.Random) -> Choice | None:
    """What ``profile`` takes for ``demand`` when it looks at all ``candidates``; None when none qualifies."""
    left = filtered(candidates, demand, profile.filters)
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
