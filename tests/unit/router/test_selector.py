"""What holds for every profile, whatever the fleet looks like."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.schema import RoutingPolicy
from cluster.router.endpoint_table import Standing
from cluster.router.holders import Holders
from cluster.router.policy.contracts import Demand
from cluster.router.policy.group import Group
from cluster.router.policy.look import ASKED_AGAIN, IN_VAIN_MAX, LOOKED_MAX, SPARES_MAX, WALKED_MAX
from cluster.router.policy.profiles import EVERYBODY, PROFILES
from cluster.router.policy.scorers import tokens_ahead
from cluster.router.policy.selector import ONLY, TURNS_MAX, Selector
from tests.unit.router.policy_fleet import BLOCK_SIZE, DIGEST, CountedSeat, FakeSeat, demand_for, holders_of, prompt_of

PROMPT = prompt_of(200)
NOBODY = Holders((), (), {})
EVERY_PROFILE = sorted(PROFILES)
seats = st.builds(
    FakeSeat,
    slot=st.just(0),
    queued_tokens=st.integers(0, 5000),
    running_tokens=st.integers(0, 50_000),
    has_room=st.booleans(),
    standing=st.sampled_from(Standing),
)


def _large(seed: int, count: int) -> list[FakeSeat]:
    rng = random.Random(seed)
    rare = rng.choice([0.02, 0.5, 1.0])
    standings = [Standing.HEALTHY, Standing.SLOW, Standing.EJECTED]
    return [
        FakeSeat(slot, rng.randrange(5000), rng.randrange(50_000), rng.random() < rare, rng.choice(standings))
        for slot in range(count)
    ]


# Few and many: of those above EVERYBODY, a profile sees a part only.
fleets = st.one_of(
    st.lists(seats, max_size=6).map(lambda made: [replace(seat, slot=slot) for slot, seat in enumerate(made)]),
    st.builds(_large, st.integers(0, 99), st.integers(EVERYBODY + 1, LOOKED_MAX)),
)


def slot_of(choice: object) -> int | None:
    return None if choice is None else choice.candidate.endpoint.incarnation.replica.slot


def test_the_config_knows_every_profile() -> None:
    assert set(get_args(RoutingPolicy)) == set(PROFILES)


@pytest.mark.parametrize("name", EVERY_PROFILE)
@settings(max_examples=60, deadline=None)
@given(fleet=fleets, data=st.data(), needs_room=st.booleans(), seed=st.integers(0, 3))
def test_who_is_taken_passes_every_filter_that_somebody_can_pass(name, fleet, data, needs_room, seed) -> None:
    chosen = st.sets(st.sampled_from([seat.incarnation for seat in fleet]), max_size=3) if fleet else st.just(set())
    refused, failed = frozenset(data.draw(chosen)), frozenset(data.draw(chosen))
    demand = demand_for(PROMPT, refused=refused, failed=failed, needs_room=needs_room)
    held = {seat.slot: 16 * (seat.slot % 12) for seat in fleet}
    choice = Selector(PROFILES[name], random.Random(seed)).choose(
        Group(fleet, BLOCK_SIZE), demand, holders_of(PROMPT, held)
    )
    wanted = [s for s in fleet if s.incarnation not in refused]
    fit = [s for s in wanted if s.has_room or not needs_room]
    if choice is None:
        sound = [s for s in wanted if s.standing is Standing.HEALTHY]
        assert not fit or (needs_room and sound), "somebody qualified, and nobody better could soon"
        return
    taken = fleet[slot_of(choice)]
    assert taken in fit
    spotless = [s for s in fit if s.has_room and s.standing is Standing.HEALTHY and s.incarnation not in failed]
    assert not spotless or taken in spotless
    assert taken.standing is Standing.HEALTHY or not any(s.standing is Standing.HEALTHY for s in fit), (
        "though it failed"
    )
    assert taken.standing is not Standing.EJECTED or all(s.standing is Standing.EJECTED for s in fit)


@pytest.mark.parametrize("name", EVERY_PROFILE)
def test_the_same_seed_picks_the_same(name: str) -> None:
    fleet = [FakeSeat(slot, queued_tokens=slot * 37 % 900) for slot in range(40)]

    def picks(seed: int) -> list[int | None]:
        selector = Selector(PROFILES[name], random.Random(seed))
        group = Group(fleet, BLOCK_SIZE)
        return [slot_of(selector.choose(group, demand_for(prompt_of(64, n)), NOBODY)) for n in range(30)]

    assert picks(1) == picks(1)


@pytest.mark.parametrize("name", ["least_load", "prefix_aware", "default", "session"])
@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(8)), seed=st.integers(0, 20))
def test_the_order_of_the_table_decides_nothing(name, order, seed) -> None:
    fleet = [FakeSeat(slot, queued_tokens=100 * slot + 7) for slot in range(8)]
    holders = holders_of(PROMPT, {3: 160, 5: 48})

    def taken(members: list[FakeSeat]) -> int | None:
        selector = Selector(PROFILES[name], random.Random(seed))
        return slot_of(selector.choose(Group(members, BLOCK_SIZE), demand_for(PROMPT), holders))

    assert taken([fleet[slot] for slot in order]) == taken(fleet)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200))
def test_round_robin_gives_everybody_the_same(count: int, picks: int) -> None:
    selector, group = (
        Selector(PROFILES["round_robin"], random.Random(0)),
        Group([FakeSeat(s) for s in range(count)], 16),
    )
    taken = Counter(slot_of(selector.choose(group, Demand("demo"), NOBODY)) for _ in range(picks))
    counts = [taken[slot] for slot in range(count)]
    assert max(counts) - min(counts) <= 1


def test_round_robin_gives_the_turn_of_who_does_not_qualify_to_the_next() -> None:
    fleet = [FakeSeat(0), FakeSeat(1, has_room=False), FakeSeat(2)]
    selector, group = Selector(PROFILES["round_robin"], random.Random(0)), Group(fleet, 16)
    picks = [slot_of(selector.choose(group, Demand("demo", needs_room=True), NOBODY)) for _ in range(4)]
    assert picks == [0, 2, 0, 2]


def test_the_next_one_with_room_has_its_turn_however_far_it_is() -> None:
    there = (WALKED_MAX, WALKED_MAX + 100, WALKED_MAX + 700)
    counts = Counter[str]()
    group = Group([CountedSeat(FakeSeat(slot, has_room=slot in there), counts) for slot in range(2000)], 16)
    selector = Selector(PROFILES["round_robin"], random.Random(0))
    picks = [slot_of(selector.choose(group, Demand("demo", needs_room=True), NOBODY)) for _ in range(4)]
    assert picks == [*there, there[0]]
    assert counts["candidate"] == len(picks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.integers(0, 1000))
def test_power_of_two_never_takes_the_worse_of_its_two(queues: list[int], seed: int) -> None:
    looked: list[FakeSeat] = []

    class Watched(FakeSeat):
        def candidate(self, cached_tokens: int = 0, **fields):
            looked.append(self)
            return super().candidate(cached_tokens, **fields)

    fleet = [Watched(slot, queued_tokens=tokens) for slot, tokens in enumerate(queues)]
    choice = Selector(PROFILES["power_of_two"], random.Random(seed)).choose(Group(fleet, 16), Demand("demo"), NOBODY)
    assert len(looked) == len({seat.slot for seat in looked}) == 2
    assert queues[slot_of(choice)] == min(seat.queued_tokens for seat in looked)


def test_power_of_two_looks_at_every_pair() -> None:
    fleet = [FakeSeat(slot) for slot in range(6)]
    group, pairs = Group(fleet, 16), set()
    for seed in range(400):
        order = list(group.shuffled(random.Random(seed)))
        assert sorted(order) == list(range(6))
        pairs.add(frozenset(order[:2]))
    assert len(pairs) == 15


def test_a_session_stays_where_it_is_and_moves_only_when_it_must() -> None:
    fleet = [FakeSeat(slot) for slot in range(12)]

    def home(members: list[FakeSeat], key: str, seed: int = 0) -> int | None:
        selector = Selector(PROFILES["session"], random.Random(seed))
        return slot_of(selector.choose(Group(members, 16), demand_for(PROMPT, session_key=key), NOBODY))

    homes = {f"s{n}": home(fleet, f"s{n}") for n in range(600)}
    assert all(home(fleet, key, seed=9) == slot for key, slot in homes.items()), "routers agree"
    counts = Counter(homes.values())
    assert max(counts.values()) < 1.6 * 600 / 12
    for key, slot in homes.items():
        assert home(fleet[1:], key) == slot or slot == 0, "only who lived there moves"
    fleet[homes["s1"]].has_room = False
    assert home(fleet, "s1") != homes["s1"]


def test_without_a_session_key_the_first_block_decides() -> None:
    fleet = [FakeSeat(slot) for slot in range(12)]
    selector, group = Selector(PROFILES["session"], random.Random(0)), Group(fleet, BLOCK_SIZE)
    homes = {slot_of(selector.choose(group, demand_for((*range(16), *prompt_of(40, n))), NOBODY)) for n in range(1, 30)}
    assert len(homes) == 1
    assert len({slot_of(selector.choose(group, demand_for(prompt_of(40, n)), NOBODY)) for n in range(1, 60)}) > 6


@pytest.mark.parametrize("name", EVERY_PROFILE)
def test_a_pick_looks_at_a_bounded_number_of_endpoints(name: str) -> None:
    """O(fleet) per request is a failure mode of its own (smg#1789)."""
    looked = 0

    class Watched(FakeSeat):
        def candidate(self, cached_tokens: int = 0, **fields):
            nonlocal looked
            looked += 1
            return super().candidate(cached_tokens, **fields)

    for full in (False, True):
        fleet = [Watched(slot, queued_tokens=slot, has_room=not full or slot % 50 == 0) for slot in range(2000)]
        holders = holders_of(PROMPT, dict.fromkeys(range(2000), 160))
        looked = 0
        demand = demand_for(PROMPT, needs_room=True)
        assert Selector(PROFILES[name], random.Random(3)).choose(Group(fleet, BLOCK_SIZE), demand, holders)
        assert 1 <= looked <= EVERYBODY
    assert LOOKED_MAX < 2000


def test_one_that_qualifies_among_thousands_is_found() -> None:
    fleet = [FakeSeat(slot, has_room=slot == 1234) for slot in range(2000)]
    for profile in PROFILES.values():
        choice = Selector(profile, random.Random(0)).choose(
            Group(fleet, BLOCK_SIZE), demand_for(PROMPT, needs_room=True), NOBODY
        )
        assert slot_of(choice) == 1234


def full(slot: int, standing: Standing = Standing.HEALTHY) -> FakeSeat:
    return FakeSeat(slot, has_room=False, standing=standing)


# Of each two, and whether somebody takes a request then.
DEGRADED = {
    "nobody has room": ((full, full), False),
    "all are slow": ((lambda slot: FakeSeat(slot, standing=Standing.SLOW),) * 2, True),
    "half are slow, the sound are full": ((full, lambda slot: FakeSeat(slot, standing=Standing.SLOW)), False),
    "half are ejected, the sound are full": ((full, lambda slot: FakeSeat(slot, standing=Standing.EJECTED)), False),
    "half are ejected, the slow are full": (
        (lambda slot: full(slot, Standing.SLOW), lambda slot: FakeSeat(slot, standing=Standing.EJECTED)),
        True,
    ),
}


@pytest.mark.parametrize("state", DEGRADED)
@pytest.mark.parametrize("name", EVERY_PROFILE)
def test_a_pick_in_a_degraded_fleet_asks_a_bounded_number_of_endpoints(name: str, state: str) -> None:
    count, (kinds, somebody) = 2000, DEGRADED[state]
    counts = Counter[str]()
    group = Group([CountedSeat(kinds[slot % 2](slot), counts) for slot in range(count)], BLOCK_SIZE)
    selector, holders = Selector(PROFILES[name], random.Random(3)), holders_of(PROMPT, dict.fromkeys(range(count), 160))
    for number in range(80):
        counts.clear()
        choice = selector.choose(group, demand_for(PROMPT, needs_room=True, session_key=str(number)), holders)
        assert (choice is not None) is somebody
        assert counts["has_room"] <= count + WALKED_MAX + IN_VAIN_MAX + ASKED_AGAIN
        # The first picks find out who is unsound, the others know.
        most = 2 * (IN_VAIN_MAX + SPARES_MAX) if number < 60 else SPARES_MAX + ASKED_AGAIN + 1
        assert counts["candidate"] <= (0 if state == "nobody has room" else most)


@pytest.mark.parametrize("name", EVERY_PROFILE)
def test_the_one_sound_endpoint_with_room_among_thousands_is_found_when_the_slow_ones_are_known(name: str) -> None:
    fleet = [full(slot) if slot % 2 else FakeSeat(slot, standing=Standing.SLOW) for slot in range(2000)]
    selector, group = Selector(PROFILES[name], random.Random(3)), Group(fleet, BLOCK_SIZE)

    def taken() -> int | None:
        return slot_of(selector.choose(group, demand_for(PROMPT, needs_room=True), NOBODY))

    assert [taken() for _ in range(30)] == [None] * 30
    for slot in (1301, 7, 1999):
        fleet[slot].has_room = True
        assert [taken() for _ in range(20)] == [slot] * 20, "at once, and every time"
        fleet[slot].has_room = False
    assert taken() is None
    for slot in (1240, 6, 500, 1998, 322):
        fleet[slot].standing = Standing.HEALTHY
        within = next(pick for pick in range(1000) if taken() == slot)
        assert within <= 1000 // ASKED_AGAIN + 1, "a recovery is noticed"
        assert {taken() for _ in range(20)} == {slot}, "for good"
        fleet[slot].standing = Standing.SLOW
        assert taken() is None


@pytest.mark.parametrize("name", EVERY_PROFILE)
def test_who_is_slow_stays_known_while_nobody_has_room(name: str) -> None:
    fleet = [FakeSeat(slot, standing=Standing.SLOW) if slot < 1000 else full(slot) for slot in range(2000)]
    selector, group = Selector(PROFILES[name], random.Random(3)), Group(fleet, BLOCK_SIZE)

    def taken() -> int | None:
        return slot_of(selector.choose(group, demand_for(PROMPT, needs_room=True), NOBODY))

    assert [taken() for _ in range(30)] == [None] * 30, "the sound ones are only full"
    for seat in fleet[:1000]:
        seat.has_room = False
    assert [taken() for _ in range(100)] == [None] * 100
    fleet[500].has_room = True
    assert [taken() for _ in range(20)] == [None] * 20, "as before"
    fleet[1500].has_room = True
    assert [taken() for _ in range(20)] == [1500] * 20


@pytest.mark.parametrize("name", EVERY_PROFILE)
@pytest.mark.parametrize("needs_room", [False, True])
def test_a_fleet_that_shrinks_forgets_who_has_left(name: str, needs_room: bool) -> None:
    fleet = [FakeSeat(slot, standing=Standing.SLOW) for slot in range(600)]
    selector, demand = Selector(PROFILES[name], random.Random(3)), demand_for(PROMPT, needs_room=needs_room)
    for _ in range(60):
        selector.choose(Group(fleet, BLOCK_SIZE), demand, NOBODY)
    fleet = fleet[300:]
    picks = [slot_of(selector.choose(Group(fleet, BLOCK_SIZE), demand, NOBODY)) for _ in range(40)]
    assert all(slot is not None and slot >= 300 for slot in picks)
    fleet[17].standing = Standing.HEALTHY
    picks = [slot_of(selector.choose(Group(fleet, BLOCK_SIZE), demand, NOBODY)) for _ in range(60)]
    assert picks[-20:] == [317] * 20, "recoveries are noticed"
    (turn,) = selector._turns.values()
    assert turn.doubted.keys() <= {seat.incarnation for seat in fleet}


@pytest.mark.parametrize("name", EVERY_PROFILE)
def test_what_is_known_of_one_checkpoint_is_not_forgotten_for_another(name: str) -> None:
    counts, digests = Counter[str](), (DIGEST, "sha256:b")
    groups = [
        Group([CountedSeat(FakeSeat(n, standing=Standing.SLOW, digest=digest), counts) for n in slots], BLOCK_SIZE)
        for digest, slots in zip(digests, (range(420), range(420, 600)), strict=True)
    ]
    selector, demand = Selector(PROFILES[name], random.Random(3)), demand_for(PROMPT, needs_room=True)
    for number in range(100):
        counts.clear()
        for digest, group in zip(digests, groups, strict=True):
            assert selector.choose(group, demand._replace(checkpoint_digest=digest), NOBODY) is not None
        if number >= 30:  # by then all are known
            assert counts["candidate"] <= 2 * (SPARES_MAX + ASKED_AGAIN + 1)


def test_checkpoints_that_are_gone_are_forgotten() -> None:
    selector, group = Selector(PROFILES["round_robin"], random.Random(3)), Group([FakeSeat(0), FakeSeat(1)], BLOCK_SIZE)
    for number in range(TURNS_MAX + 10):
        selector.choose(group, demand_for(PROMPT)._replace(checkpoint_digest=f"sha256:{number}"), NOBODY)
    assert len(selector._turns) == TURNS_MAX
    assert ("demo", f"sha256:{TURNS_MAX + 9}") in selector._turns


@pytest.mark.parametrize("name", EVERY_PROFILE)
@pytest.mark.parametrize("settles", [False, True])
def test_a_slow_endpoint_among_thousands_that_are_ejected_is_found(name: str, settles: bool) -> None:
    fleet = [FakeSeat(slot, standing=Standing.EJECTED) for slot in range(600)]
    fleet[431] = FakeSeat(431, standing=Standing.SLOW)
    if settles:
        fleet[5] = full(5)
    selector, group = Selector(PROFILES[name], random.Random(3)), Group(fleet, BLOCK_SIZE)
    picks = [
        slot_of(selector.choose(group, demand_for(PROMPT, needs_room=True, settles=settles), NOBODY)) for _ in range(60)
    ]
    assert picks[10:] == [431] * 50
    without = selector.choose(group, demand_for(PROMPT, needs_room=True), NOBODY)
    assert slot_of(without) == (None if settles else 431)


@pytest.mark.parametrize("name", EVERY_PROFILE)
def test_a_slow_endpoint_among_a_few_with_room_comes_before_those_that_are_ejected(name: str) -> None:
    fleet = [
        FakeSeat(n, has_room=n % 32 == 0, standing=Standing.EJECTED if n % 32 == 0 else Standing.SLOW)
        for n in range(2000)
    ]
    fleet[800].standing = Standing.SLOW
    selector, group = Selector(PROFILES[name], random.Random(3)), Group(fleet, BLOCK_SIZE)
    picks = [slot_of(selector.choose(group, demand_for(PROMPT, needs_room=True), NOBODY)) for _ in range(90)]
    assert picks[30:] == [800] * 60


@pytest.mark.parametrize("name", EVERY_PROFILE)
def test_few_with_room_are_compared_though_all_are_known_to_be_slow(name: str) -> None:
    fleet = [full(slot, Standing.SLOW) for slot in range(1000)]
    selector, group = Selector(PROFILES[name], random.Random(3)), Group(fleet, BLOCK_SIZE)
    for seat in fleet:
        seat.has_room = True
    for _ in range(20):
        assert selector.choose(group, demand_for(PROMPT, needs_room=True), NOBODY)
    for seat in fleet:
        seat.has_room = seat.slot in (300, 301, 302)
    taken = {
        slot_of(selector.choose(group, demand_for(PROMPT, needs_room=True, session_key=str(key)), NOBODY))
        for key in range(60)
    }
    assert taken == {300, 301, 302}


@pytest.mark.parametrize("name", EVERY_PROFILE)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    count=st.one_of(st.integers(0, 12), st.integers(0, LOOKED_MAX), st.integers(LOOKED_MAX + 1, 250)),
    data=st.data(),
    needs_room=st.booleans(),
    settles=st.booleans(),
)
def test_who_is_taken_is_one_of_those_who_are_said_to_qualify(name, seed, count, data, needs_room, settles) -> None:
    """Of large fleets: as soon as their endpoints are known, as long as nothing changes."""
    fleet = _large(seed, count)
    chosen = st.sets(st.sampled_from(fleet).map(lambda seat: seat.incarnation), max_size=3) if fleet else st.just(set())
    demand = demand_for(
        PROMPT,
        refused=frozenset(data.draw(chosen)),
        failed=frozenset(data.draw(chosen)),
        needs_room=needs_room,
        settles=settles,
    )
    selector, group = Selector(PROFILES[name], random.Random(seed)), Group(fleet, BLOCK_SIZE)
    for _ in range(12 if count > LOOKED_MAX else 0):
        selector.choose(group, demand, NOBODY)
    rows = selector.explain(group, [], demand, NOBODY)
    qualified = {row.candidate.endpoint.incarnation for row in rows if row.qualifies}
    assert [row.qualifies for row in rows if row.taken] == [True] * bool(qualified)
    assert {row.candidate.endpoint.incarnation for row in rows if row.looked_at} <= qualified
    for row in rows:
        assert row.qualifies or not all(passes for _, passes, _ in row.filters), "who is kept out says by what"
    choice = selector.choose(group, demand, NOBODY)
    assert (choice is None) is (not qualified)
    assert choice is None or choice.candidate.endpoint.incarnation in qualified


def test_what_is_remembered_of_unsound_endpoints_is_bounded() -> None:
    selector = Selector(PROFILES["default"], random.Random(0))
    for generation in range(1, 9):
        fleet = [FakeSeat(slot, standing=Standing.SLOW, generation=generation) for slot in range(LOOKED_MAX + 20)]
        for _ in range(4):
            assert selector.choose(Group(fleet, BLOCK_SIZE), demand_for(PROMPT, needs_room=True), NOBODY)
        [turn] = selector._turns.values()
        assert LOOKED_MAX <= len(turn.doubted) <= len(fleet)
    small = fleet[:LOOKED_MAX]
    before = dict(turn.doubted)
    fleet[7].standing = Standing.HEALTHY
    assert fleet[7].incarnation in before
    assert slot_of(selector.choose(Group(small, BLOCK_SIZE), demand_for(PROMPT, needs_room=True), NOBODY)) == 7
    assert turn.doubted == before, "small fleets are asked anew every time"


@pytest.mark.parametrize("name", EVERY_PROFILE)
@pytest.mark.parametrize("count", [2, 400])
def test_an_explanation_says_that_a_request_waits_for_a_sound_endpoint(name: str, count: int) -> None:
    fleet = [full(slot) if slot % 2 else FakeSeat(slot, standing=Standing.SLOW) for slot in range(count)]
    selector, group = Selector(PROFILES[name], random.Random(0)), Group(fleet, BLOCK_SIZE)

    def told(**fields: object) -> tuple[set[int], set[str]]:
        rows = selector.explain(group, [], demand_for(PROMPT, needs_room=True, **fields), NOBODY)
        qualified = {row.candidate.endpoint.incarnation.replica.slot for row in rows if row.qualifies}
        assert any(row.taken for row in rows) is bool(qualified)
        return qualified, {rule for row in rows for rule, passes, required in row.filters if required and not passes}

    slow = set(range(0, count, 2))
    assert told() == (set(), {"has_room", "not_slow"})
    assert told(settles=True) == (slow, {"has_room"})
    for slot in slow:
        fleet[slot].standing = Standing.EJECTED
    assert told(settles=True) == (set(), {"has_room", "not_ejected"})
    for seat in fleet:
        seat.standing = Standing.SLOW
    assert told() == (slow, {"has_room"})


def test_an_explanation_of_a_large_degraded_fleet_foretells_the_pick_and_remembers_nothing() -> None:
    fleet = [FakeSeat(slot, queued_tokens=slot % 7, standing=Standing.SLOW) for slot in range(400)]
    for profile in PROFILES.values():
        selector, group = Selector(profile, random.Random(5)), Group(fleet, BLOCK_SIZE)
        for number in range(8):
            demand = demand_for(PROMPT, needs_room=True, session_key=str(number))
            rows = selector.explain(group, [], demand, NOBODY)
            assert selector.explain(group, [], demand, NOBODY) == rows
            [foretold] = [row.candidate for row in rows if row.taken]
            choice = selector.choose(group, demand, NOBODY)
            assert choice is not None
            assert choice.candidate == foretold


def test_equal_holders_share_the_work() -> None:
    fleet = [FakeSeat(slot) for slot in range(300)]
    holders = holders_of(PROMPT, dict.fromkeys(range(300), 192))
    selector, group = Selector(PROFILES["default"], random.Random(1)), Group(fleet, BLOCK_SIZE)
    taken = Counter(slot_of(selector.choose(group, demand_for(PROMPT), holders)) for _ in range(1500))
    assert len(taken) > 280
    assert max(taken.values()) < 20


def test_the_scorer_that_made_the_difference_is_named() -> None:
    def loudest(fleet: list[FakeSeat], held: dict[int, int], name: str = "prefix_aware") -> str:
        choice = Selector(PROFILES[name], random.Random(0)).choose(
            Group(fleet, BLOCK_SIZE), demand_for(PROMPT), holders_of(PROMPT, held)
        )
        assert choice is not None
        return choice.scorer

    assert loudest([FakeSeat(0), FakeSeat(1)], {1: 160}) == "cached_prefix"
    assert loudest([FakeSeat(0, queued_tokens=900), FakeSeat(1)], {}) == "short_queue"
    assert loudest([FakeSeat(0)], {0: 160}) == ONLY
    assert loudest([FakeSeat(0), FakeSeat(1)], {}, "round_robin") == "turn"


def test_an_explanation_foretells_the_pick_and_moves_nothing() -> None:
    fleet = [FakeSeat(slot, queued_tokens=slot % 3) for slot in range(60)]
    holders = holders_of(PROMPT, {7: 64, 9: 160})
    for profile in PROFILES.values():
        selector, group = Selector(profile, random.Random(5)), Group(fleet, BLOCK_SIZE)
        for number in range(5):
            demand = demand_for(PROMPT, session_key=str(number))
            rows = selector.explain(group, [], demand, holders)
            again = selector.explain(group, [], demand, holders)
            assert rows == again
            assert len(rows) == len(fleet)
            [foretold] = [row.candidate for row in rows if row.taken]
            choice = selector.choose(group, demand, holders)
            assert choice is not None
            assert choice.candidate == foretold
            looked = [row for row in rows if row.looked_at]
            assert len(looked) == min(profile.enough, len(fleet))
            assert foretold in [row.candidate for row in looked]


def test_who_is_kept_out_is_scored_as_if_nobody_were_and_the_others_as_if_it_was_not_there() -> None:
    free, loaded = FakeSeat(0), FakeSeat(1, queued_tokens=100)
    full, elsewhere = FakeSeat(2, queued_tokens=400, has_room=False), FakeSeat(3, queued_tokens=50, digest="other")
    selector = Selector(PROFILES["least_load"], random.Random(0))
    demand = demand_for(PROMPT, needs_room=True)
    rows = selector.explain(Group([free, loaded, full], BLOCK_SIZE), [elsewhere], demand, holders_of(PROMPT, {}))
    seen = {row.candidate.endpoint.incarnation.replica.slot: row for row in rows}
    assert {slot: row.qualifies for slot, row in seen.items()} == {0: True, 1: True, 2: False, 3: False}
    scores = {slot: row.total for slot, row in seen.items()}
    assert scores == {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.875}
    assert [slot for slot, row in seen.items() if row.taken] == [0]


def test_tokens_ahead_are_those_to_be_computed_and_a_little_for_those_that_run() -> None:
    waiting = FakeSeat(0, queued_tokens=100).candidate(has_room=True)
    running = FakeSeat(1, running_tokens=1000).candidate(has_room=True)
    assert tokens_ahead(waiting) == 100
    assert 0 < tokens_ahead(running) < 100
