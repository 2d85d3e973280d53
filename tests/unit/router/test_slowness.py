"""Who is slow, who only looks like it, and how the way back goes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.domain.ids import Incarnation, ReplicaId
from cluster.router.slowness import Slowness, SlownessRules

RULES = SlownessRules(gathered_s=0.0, judged_steps=1)


def at(slot: int, model: str = "demo") -> Incarnation:
    return Incarnation(ReplicaId(model, slot), 1)


class Replicas:
    """Engines that step for ever, each at its own pace."""

    def __init__(self, step_s: Sequence[float], rules: SlownessRules = RULES) -> None:
        self.slowness, self.step_s, self.now_s = Slowness(rules), dict(enumerate(step_s)), 0.0
        self.paces = {slot: self.slowness.came_up(at(slot)) for slot in self.step_s}
        self.next_s, self.steps = dict.fromkeys(self.step_s, 0.0), dict.fromkeys(self.step_s, 0)
        self.sequences = dict.fromkeys(self.step_s, 1)
        self.begun = dict(self.sequences)  # how many the step that runs has

    def run(self, seconds: float, idle: Sequence[int] = ()) -> list[int]:
        """Who is slow after so long."""
        end_s = self.now_s + seconds
        while (slot := min(self.next_s, key=self.next_s.__getitem__)) is not None and self.next_s[slot] <= end_s:
            self.now_s = self.next_s[slot]
            self.next_s[slot] += self.step_s[slot]
            if slot not in idle:
                self.steps[slot] += 1
                running = self.begun[slot]
                self.paces[slot].stepped(self.now_s, self.steps[slot], busy=True, sequences=running)
            self.begun[slot] = self.sequences[slot]
        self.now_s = end_s
        return self.slow()

    def slow(self) -> list[int]:
        return [slot for slot in self.step_s if self.slowness.slow(at(slot), self.now_s)]


def test_one_that_is_ten_times_slower_is_noticed_within_seconds() -> None:
    assert Replicas([0.03, 0.03, 0.3, 0.03]).run(3.0) == [2]
    assert Replicas([0.3, 0.03]).run(3.0) == [0]


def test_one_that_becomes_slow_is_noticed_and_one_that_recovers_is_trusted_again() -> None:
    replicas = Replicas([0.03, 0.03, 0.03])
    assert replicas.run(10.0) == []
    replicas.step_s[1] = 0.3
    assert replicas.run(3.0) == [1]
    replicas.step_s[1] = 0.03
    assert replicas.run(1.0) == [], "its running streams show it"


def test_ten_times_slower_is_seen_by_a_few_steps_and_its_streams_are_moved_a_few_steps_later() -> None:
    replicas = Replicas([0.03, 0.03, 0.03, 0.03], SlownessRules())
    replicas.run(3.0)
    replicas.step_s[2], pace = 0.3, replicas.paces[2]
    assert replicas.run(0.9) == []
    assert replicas.run(0.7) == [2]
    assert pace.leaving(9) == 0, "too few steps for that"
    replicas.run(1.3)
    assert [pace.leaving(9), pace.leaving(3)] == [4, 3]
    for _ in range(2):
        pace.moved(pace.leaving(9))
    assert pace.leaving(5) == 1, "no more than were there"
    pace.moved(1)
    assert pace.leaving(5) == 0
    replicas.step_s[2] = 0.03
    assert replicas.run(1.0) == []
    assert pace.leaving(9) == 0


def test_a_probe_stays_for_a_few_steps_and_leaves_when_they_are_slow() -> None:
    replicas = Replicas([0.03, 0.03, 0.3], SlownessRules())
    pace = replicas.paces[2]
    replicas.run(4.0)
    while leaving := pace.leaving(6):
        pace.moved(leaving)
    replicas.run(6.0)
    replicas.slowness.picked(at(2), replicas.now_s)
    replicas.run(1.0)
    assert pace.leaving(1) == 0, "three steps"
    replicas.run(0.5)
    assert pace.leaving(1) == 1
    pace.moved(1)
    replicas.run(10.0)
    replicas.slowness.picked(at(2), replicas.now_s)
    replicas.step_s[2] = 0.03
    for _ in range(10):
        replicas.run(0.1)
        assert pace.leaving(1) == 0
    assert replicas.slow() == []
    assert not pace.slow


def test_what_slows_all_down_at_once_is_no_verdict() -> None:
    replicas = Replicas([0.03] * 5, SlownessRules())
    replicas.run(3.0)
    for slot, factor in enumerate((10.0, 10.3, 9.8, 11.0, 10.1)):
        replicas.step_s[slot] = 0.03 * factor
    for _ in range(100):
        assert replicas.run(0.1) == []


def test_three_slow_steps_in_a_row_are_no_verdict() -> None:
    replicas = Replicas([0.03, 0.03, 0.03], SlownessRules())
    for _ in range(20):
        replicas.step_s[1] = 0.03
        assert replicas.run(2.0) == []
        replicas.step_s[1] = 0.3
        assert replicas.run(0.9) == []


def test_five_times_as_slow_moves_nothing() -> None:
    replicas = Replicas([0.03, 0.03, 0.14])
    assert replicas.run(4.0) == [2]
    assert replicas.paces[2].leaving(9) == 0


def test_twice_as_slow_is_what_load_explains() -> None:
    assert Replicas([0.03, 0.03, 0.06]).run(10.0) == []


def test_between_the_two_factors_a_verdict_stays_as_it_is() -> None:
    replicas = Replicas([0.03, 0.03, 0.3])
    assert replicas.run(3.0) == [2]
    replicas.step_s[2] = 0.06
    assert replicas.run(1.5) == [2]


def test_alone_nobody_is_slow() -> None:
    assert Replicas([3.0]).run(100.0) == []
    pair = Replicas([0.03, 0.3])
    assert pair.run(3.0) == [1]
    pair.slowness.went_down(at(0))
    assert pair.slow() == []


def test_all_alike_nobody_is_slow() -> None:
    assert Replicas([3.0, 3.0, 3.0]).run(100.0) == []


def test_what_is_quick_enough_is_not_slow_whatever_others_do() -> None:
    assert Replicas([0.001, 0.001, 0.015]).run(5.0) == []


def test_a_hiccup_is_no_verdict() -> None:
    replicas = Replicas([0.03, 0.03])
    replicas.run(3.0)
    replicas.next_s[1] += 5.0
    assert replicas.run(6.0) == []


def test_idle_times_count_for_nothing() -> None:
    pace, now_s = Slowness(RULES).came_up(at(0)), 0.0
    for step in range(1, 200):
        pace.stepped(now_s, step, busy=step % 2 == 1)
        now_s += 0.03 if step % 2 else 100.0
    assert pace.median_s is not None
    assert abs(pace.median_s - 0.03) < 1e-6


def test_a_cancelled_stream_makes_no_slow_step_of_the_pause_after_it() -> None:
    pace, now_s = Slowness(RULES).came_up(at(0)), 0.0
    for step in range(1, 200):
        pace.stepped(now_s, step, busy=True)  # the second step's sequence is cancelled; the engine cannot know yet
        if step % 2 == 0:
            now_s += 50.0
            pace.idle()
        now_s += 0.03
    assert abs(pace.median_s - 0.03) < 1e-6


def test_steps_without_us_share_the_time_between() -> None:
    pace = Slowness(RULES).came_up(at(0))
    for message in range(20):
        pace.stepped(0.3 * message, 10 * message, busy=True)
    assert abs(pace.median_s - 0.03) < 1e-6


def test_idle_peers_are_no_measure_but_a_verdict_outlives_them() -> None:
    replicas = Replicas([0.03, 0.3])
    assert replicas.run(4.0) == [1]
    assert replicas.run(15.0, idle=(0, 1)) == [], "time for a probe"
    replicas.slowness.picked(at(1), replicas.now_s)
    assert replicas.slow() == [1]
    assert replicas.run(4.0, idle=(0,)) == [1]
    replicas.step_s[1] = 0.03
    assert replicas.run(2.0, idle=(0,)) == []


def test_probes_go_one_at_a_time_and_ever_more_seldom() -> None:
    replicas, probes = Replicas([0.03, 0.03, 0.3]), []
    for _ in range(4_000):
        replicas.run(0.1)
        if replicas.now_s > 3.0 and 2 not in replicas.slow():
            probes.append(replicas.now_s)
            replicas.slowness.picked(at(2), replicas.now_s)
            replicas.slowness.picked(at(2), replicas.now_s)
    gaps = [round(b - a) for a, b in itertools.pairwise(probes)]
    assert gaps[:4] == [10, 20, 40, 60]
    assert set(gaps[3:]) == {60}


def test_models_are_compared_with_their_own_kind() -> None:
    replicas = Replicas([0.03, 0.03])
    other = replicas.slowness.came_up(at(0, "large"))
    for step in range(100):
        other.stepped(step * 0.5, step, busy=True)
    replicas.run(10.0)
    assert not replicas.slowness.slow(at(0, "large"), replicas.now_s)


def loaded(*sequences: int, step_s: float = 0.004, each_s: float = 0.002, rules: SlownessRules = RULES) -> Replicas:
    """Equal machines, whose steps take so long and so much for each of their sequences."""
    replicas = Replicas([step_s + each_s * count for count in sequences], rules)
    replicas.sequences = dict(enumerate(sequences))
    replicas.begun = dict(replicas.sequences)
    return replicas


@pytest.mark.parametrize("full", [32, 64, 100, 256])
@pytest.mark.parametrize("peers", [1, 3])
def test_a_full_replica_beside_empty_ones_is_not_slow_and_moves_nothing(full: int, peers: int) -> None:
    """The times of a real engine: 7.4 ms with one sequence, 16 ms with 32, 0.32 ms for each further one."""
    for rules in (RULES, SlownessRules()):
        replicas = Replicas([0.0083 + 0.000323 * (full - 8), *[0.00742] * peers], rules)
        replicas.sequences[0] = replicas.begun[0] = full
        for _ in range(60):
            assert replicas.run(0.1) == []
            assert replicas.paces[0].leaving(full) == 0


def test_load_that_comes_and_goes_again_is_no_slowness() -> None:
    replicas = loaded(4, 4, 4, rules=SlownessRules())
    replicas.run(2.0)
    for sequences in (100, 8, 200, 1, 60):
        replicas.step_s[0], replicas.sequences[0] = 0.004 + 0.002 * sequences, sequences
        for _ in range(30):
            assert replicas.run(0.1) == []


def test_a_slow_one_on_which_sequences_have_piled_up_is_noticed() -> None:
    replicas = loaded(8, 2, 2, step_s=0.03, each_s=0.0)
    replicas.step_s[0] = 0.3
    assert replicas.run(3.0) == [0]
    replicas.step_s[0], replicas.sequences[0] = 0.03, 2
    replicas.run(2.0)
    assert not replicas.paces[0].slow


def test_those_that_come_nearest_in_load_are_the_measure_where_none_is_as_loaded() -> None:
    replicas = loaded(9, 4, 1, step_s=0.02, each_s=0.0005)
    replicas.step_s[0] *= 10
    assert replicas.run(4.0) == [0]


def test_those_as_loaded_are_a_closer_measure_than_the_idle_ones() -> None:
    replicas = loaded(20, 20, 1, 1, 1, 1, step_s=0.02, each_s=0.0005)
    replicas.step_s[0] *= 4
    assert replicas.run(3.0) == [0], "ten times the time of a single sequence would not be enough"


def test_streams_stay_where_their_load_explains_most_of_it() -> None:
    """Four times slower than its one peer that is as loaded, and much slower than those that are not."""
    replicas = loaded(20, 20, 1, 1, 1, 1, step_s=0.01, each_s=0.002)
    replicas.step_s[0] *= 4
    for _ in range(50):
        replicas.run(0.1)
        assert replicas.paces[0].leaving(20) == 0
    assert replicas.slow() == [0]


def test_recovery_is_measured_by_those_as_loaded() -> None:
    replicas = loaded(20, 20, 1, 1, 1, 1, step_s=0.01, each_s=0.002)
    quick_s = replicas.step_s[0]
    replicas.step_s[0] *= 10
    assert replicas.run(5.0) == [0]
    replicas.step_s[0] = quick_s
    replicas.run(2.0)
    assert not replicas.paces[0].slow


def test_a_probe_that_got_nothing_is_repeated_unless_steps_have_shown_enough() -> None:
    replicas = Replicas([0.03, 0.03, 0.3], SlownessRules())
    pace = replicas.paces[2]
    replicas.run(8.0)
    assert replicas.slowness.picked(at(2), replicas.now_s)
    replicas.slowness.unpicked(at(2), replicas.now_s)
    assert replicas.slowness.picked(at(2), replicas.now_s), "at once"
    replicas.run(2.0)
    assert pace.leaving(1) == 1
    replicas.slowness.unpicked(at(2), replicas.now_s)
    assert not replicas.slowness.picked(at(2), replicas.now_s), "it is as slow as it was"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 256), min_size=2, max_size=4),
    st.floats(0.0, 0.05),
    st.floats(0.0005, 0.01),
    st.booleans(),
)
def test_nothing_that_load_explains_is_slowness(
    sequences: list[int], step_s: float, each_s: float, often: bool
) -> None:
    replicas = loaded(*sequences, step_s=step_s, each_s=each_s, rules=RULES if often else SlownessRules())
    slowest_s = max(replicas.step_s.values())
    for _ in range(5):
        replicas.run(8 * slowest_s)
        assert not any(pace.slow for pace in replicas.paces.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 64), st.lists(st.integers(1, 64), min_size=1, max_size=5), st.floats(0.5, 2.0))
def test_ten_times_as_slow_beside_as_many_is_noticed_whatever_the_others_have(
    count: int, others: list[int], share: float
) -> None:
    replicas = loaded(count, math.ceil(share * count), *others, step_s=0.02, each_s=0.0005)
    replicas.step_s[0] *= 10
    replicas.run(30 * replicas.step_s[0])
    assert [slot for slot, pace in replicas.paces.items() if pace.slow] == [0]


@pytest.mark.parametrize(("count", "slow"), [(60, 20), (200, 17), (200, 80)])
def test_whoever_is_slow_in_a_large_fleet_is_noticed_and_stays_so(count: int, slow: int) -> None:
    replicas = Replicas([0.03] * count, SlownessRules())
    by_pace = {pace: slot for slot, pace in replicas.paces.items()}
    first = [by_pace[pace] for pace in replicas.slowness._models["demo"].paces][:slow]  # as a loop over them meets them
    for slot in first:
        replicas.step_s[slot] = 0.3
    replicas.run(12.0)
    for _ in range(6):
        assert [slot for slot, pace in replicas.paces.items() if pace.slow] == sorted(first)
        replicas.run(1.0)
    for slot in first[: slow // 2]:
        replicas.step_s[slot] = 0.03
    replicas.run(3.0)
    assert {slot for slot, pace in replicas.paces.items() if pace.slow} == set(first[slow // 2 :])


@pytest.mark.parametrize(("count", "slow"), [(33, 19), (60, 33), (300, 195), (300, 240)])
def test_where_most_are_slow_nobody_stays_so(count: int, slow: int) -> None:
    drawn = random.Random(count + slow).sample(range(count), slow)
    replicas = Replicas([0.15 if slot in drawn else 0.033 for slot in range(count)], SlownessRules())
    replicas.run(6.0)  # the quick ones were there first
    assert not any(pace.slow for pace in replicas.paces.values())
    assert not replicas.slowness.convicted


def test_a_slow_one_whose_peers_have_less_to_do_now_is_compared_with_others() -> None:
    replicas = Replicas([0.3] + [0.03] * 99, SlownessRules())
    replicas.sequences.update(dict.fromkeys(replicas.sequences, 8))
    replicas.run(6.0)
    verdict = replicas.paces[0]._verdict
    assert verdict is not None
    for slot, pace in replicas.paces.items():
        if slot and pace not in verdict.peers:
            replicas.sequences[slot], replicas.step_s[slot] = 64, 0.12
    replicas.sequences[0], replicas.step_s[0] = 64, 0.12
    replicas.run(5.0)
    assert not replicas.paces[0].slow


def test_a_few_as_loaded_are_no_measure_in_a_large_fleet_beside_what_load_explains() -> None:
    for seed in range(4):
        rng = random.Random(seed)
        replicas = Replicas([0.03] * 200, SlownessRules())
        replicas.sequences.update(dict.fromkeys(replicas.sequences, 8))
        for slot in rng.sample(range(200), 10):  # of which the quickest needs a third of what the slowest does
            replicas.sequences[slot], replicas.step_s[slot] = 64, rng.uniform(0.08, 0.28)
        replicas.run(10.0)
        assert not any(pace.slow for pace in replicas.paces.values())
        replicas.step_s[7], replicas.sequences[7] = 1.5, 64
        replicas.run(20.0)
        assert [slot for slot, pace in replicas.paces.items() if pace.slow] == [7]


def test_nothing_is_kept_of_a_model_whose_endpoints_have_gone() -> None:
    replicas = Replicas([0.03] * 40, SlownessRules())
    replicas.run(3.0)
    peers = replicas.slowness._models["demo"]
    for slot in range(40):
        assert peers.gathered
        replicas.slowness.went_down(at(slot))
    assert not peers.gathered, "they know it, and would wait for the collector of cycles"
    assert not replicas.slowness._models


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.03, 0.1, 0.3, 1.0]), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_never_more_than_half_whatever_happens(step_s: list[float], rng: random.Random) -> None:
    replicas = Replicas(step_s)
    for _ in range(12):
        slow = replicas.run(4.0, idle=rng.sample(range(len(step_s)), rng.randrange(len(step_s) + 1)))
        assert replicas.slowness.convicted == {p for p in map(replicas.paces.get, replicas.step_s) if p and p.slow}
        assert len(slow) <= len(replicas.step_s) // 2
        if len(replicas.step_s) > 1 and rng.random() < 0.3:
            gone = rng.choice(list(replicas.step_s))
            del replicas.step_s[gone], replicas.next_s[gone]
            replicas.slowness.went_down(at(gone))
        changed = rng.choice(list(replicas.step_s))
        replicas.step_s[changed] = rng.choice([0.03, 0.3, 1.0])
        assert len(replicas.slow()) <= len(replicas.step_s) // 2


class Streams:
    """Requests of 100 tokens that come all the time, on engines that give each stream one token per step."""

    def __init__(self, step_s: Sequence[float]) -> None:
        self.replicas = Replicas(step_s, SlownessRules())
        self.streams: dict[int, list[int]] = {slot: [] for slot in self.replicas.step_s}
        self.gaps: list[float] = []

    def arrive(self) -> None:
        judge, now_s = self.replicas.slowness, self.replicas.now_s
        open_to = [s for s in self.streams if not judge.slow(at(s), now_s)] or list(self.streams)
        slot = min(open_to, key=lambda s: len(self.streams[s]))
        judge.picked(at(slot), now_s)
        self.streams[slot].append(100)

    def run(self, seconds: float, every_s: float) -> list[float]:
        """All gaps between tokens in that time."""
        self.gaps, replicas = [], self.replicas
        end_s, arrival_s = replicas.now_s + seconds, replicas.now_s
        while replicas.now_s < end_s:
            slot = min(replicas.next_s, key=replicas.next_s.__getitem__)
            if arrival_s <= replicas.next_s[slot]:
                replicas.now_s, arrival_s = arrival_s, arrival_s + every_s
                self.arrive()
                continue
            replicas.now_s = replicas.next_s[slot]
            replicas.next_s[slot] += replicas.step_s[slot]
            if self.streams[slot]:
                replicas.steps[slot] += 1
                running = len(self.streams[slot])
                self.gaps += [replicas.step_s[slot]] * len(self.streams[slot])
                self.streams[slot] = [left - 1 for left in self.streams[slot] if left > 1]
                pace = replicas.paces[slot]
                busy = bool(self.streams[slot])
                pace.stepped(replicas.now_s, replicas.steps[slot], busy=busy, sequences=running)
                leaving = pace.leaving(len(self.streams[slot]))
                pace.moved(leaving)
                for _ in range(leaving):
                    others = [s for s in self.streams if s != slot]
                    self.streams[min(others, key=lambda s: len(self.streams[s]))].append(self.streams[slot].pop())
        return sorted(self.gaps)


def test_with_a_slow_replica_the_fleets_p99_is_that_of_the_healthy() -> None:
    fleet = Streams([0.03, 0.03, 0.03, 0.03])
    healthy = fleet.run(30.0, 0.1)
    fleet.replicas.step_s[3] = 0.3
    fleet.run(5.0, 0.1)  # noticed, and the streams that were there have gone on elsewhere
    drained = fleet.run(120.0, 0.1)
    p99 = [gaps[int(0.99 * len(gaps))] for gaps in (healthy, drained)]
    assert p99[1] <= 1.5 * p99[0]
    share = sum(gap > 0.1 for gap in drained) / len(drained)
    assert 0 < share < 0.01, "the probes still go there"
    fleet.replicas.step_s[3] = 0.03
    fleet.run(70.0, 0.1)
    assert len(fleet.streams[3]) > 0.15 * sum(map(len, fleet.streams.values())), "it takes its share again"
