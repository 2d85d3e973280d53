"""The routing simulation with the production profiles: what the policies promise, on fixed seeds."""

from __future__ import annotations

from functools import cache

import pytest

from cluster.router.policy.profiles import PROFILES
from ops.bench.routing.simulation import Report, Site, at_random, best_hit_rate, capture, greedy, of_profile, run
from ops.bench.routing.traces import TRACES, Trace

SEED = 1


REQUESTS = {"multi_turn_chat": 90, "shared_prompts": 500, "uncorrelated": 400}  # the first are conversations


@cache
def trace(name: str) -> Trace:
    return TRACES[name](SEED, REQUESTS[name])


@cache
def report(name: str, profile: str, routers: int = 1) -> Report:
    return run(trace(name), of_profile(PROFILES[profile], SEED), Site(routers=routers))


@cache
def by_chance(name: str) -> Report:
    return run(trace(name), at_random(SEED))


@pytest.mark.parametrize("profile", ["prefix_aware", "default"])
@pytest.mark.parametrize("name", ["multi_turn_chat", "shared_prompts"])
def test_nine_tenths_of_the_hits_there_are_get_hit(name: str, profile: str) -> None:
    got = report(name, profile)
    assert capture(got.hit_rate, by_chance(name).hit_rate, best_hit_rate(trace(name))) >= 0.9
    unaware = report(name, "least_load")
    assert got.ttft_mean_s < unaware.ttft_mean_s
    assert got.ttft_p99_s < unaware.ttft_p99_s


@pytest.mark.parametrize("profile", ["prefix_aware", "default"])
def test_where_nothing_is_shared_it_is_no_worse_than_least_load(profile: str) -> None:
    got, unaware = report("uncorrelated", profile), report("uncorrelated", "least_load")
    assert got.hit_rate == unaware.hit_rate == 0
    # Whoever is even a little busier than another may get a prompt whose home it is: one place of 400 in the tail.
    assert got.ttft_mean_s <= 1.02 * unaware.ttft_mean_s
    assert got.ttft_p99_s <= 1.05 * unaware.ttft_p99_s


@pytest.mark.parametrize("name", ["multi_turn_chat", "shared_prompts"])
def test_routers_that_share_nothing_stay_near_one(name: str) -> None:
    best, chance = best_hit_rate(trace(name)), by_chance(name).hit_rate
    one, four = (capture(report(name, "default", n).hit_rate, chance, best) for n in (1, 4))
    assert four >= 0.95 * one


def test_where_nothing_is_shared_many_routers_are_as_good_as_one() -> None:
    """Replicas tell each router what the others send; without such news 16 routers take 1.8 times as long."""
    one, many = report("uncorrelated", "default"), report("uncorrelated", "default", 16)
    assert many.ttft_mean_s <= 1.05 * one.ttft_mean_s
    assert many.ttft_p99_s <= 1.05 * one.ttft_p99_s
    unheard = run(trace("uncorrelated"), of_profile(PROFILES["default"], SEED), Site(routers=16, load_pause_s=None))
    assert unheard.ttft_mean_s > 1.3 * one.ttft_mean_s, "the simulation can tell"


def test_affinity_alone_makes_a_hot_spot_where_all_prompts_begin_alike() -> None:
    """The simulation can tell: whoever only follows the cache sends every chat to one replica."""
    followed = run(trace("multi_turn_chat"), greedy())
    assert followed.imbalance > 3
    assert followed.ttft_mean_s > 2 * report("multi_turn_chat", "default").ttft_mean_s
