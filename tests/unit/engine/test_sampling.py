from __future__ import annotations

import math
from collections import Counter

import pytest

from cluster.engine.sampling import (
    GOLDEN,
    LARGEST_UNIFORM,
    gumbel,
    mix64,
    noise_key,
    token_hash,
    uniform,
    unit_interval,
)

# The first outputs of splitmix64 with state 0, as published with the reference implementation.
SPLITMIX64 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]

PINNED_KEYS = [0xA706DD2F4D197E6F, 0xB382A305F4414F5E, 0x5E41AB087439611E, 0x25235B226B44FCA8]
PINNED_UNIFORMS = [0.37270049752971063, 0.44950745533917275, 0.33612923495843755]


@pytest.mark.parametrize(("index", "expected"), list(enumerate(SPLITMIX64)))
def test_the_hash_is_splitmix64(index: int, expected: int) -> None:
    assert mix64((index + 1) * GOLDEN) == expected
    assert token_hash(0, index) == expected


def test_the_noise_never_changes() -> None:
    """Replicas of different versions continue each other's sequences."""
    assert [noise_key(s, p) for s, p in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 12345)]] == PINNED_KEYS
    assert [uniform(noise_key(7, 3), t) for t in (0, 1, 128_255)] == PINNED_UNIFORMS


def test_uniforms_stay_inside_the_open_interval() -> None:
    assert unit_interval(0) == 0.5 / 2**53
    assert unit_interval(2**64 - 1) == LARGEST_UNIFORM < 1.0
    assert unit_interval(2**64 - 1 - 2**11) <= LARGEST_UNIFORM
    assert math.isfinite(-math.log(-math.log(unit_interval(2**64 - 1))))
    assert math.isfinite(-math.log(-math.log(unit_interval(0))))


def test_uniforms_are_uniform() -> None:
    key = noise_key(1234, 56)
    draws = [uniform(key, token) for token in range(20_000)]
    assert math.isclose(sum(draws) / len(draws), 0.5, abs_tol=4 * math.sqrt(1 / 12 / len(draws)))
    counts = Counter(int(u * 50) for u in draws)
    expected = len(draws) / 50
    assert chi_square([counts[i] for i in range(50)], [expected] * 50) < 85.4  # 49 degrees, p = 0.001


def test_gumbel_mean_and_variance() -> None:
    draws = [gumbel(noise_key(9, position), token) for position in range(100) for token in range(200)]
    mean = sum(draws) / len(draws)
    variance = sum((g - mean) ** 2 for g in draws) / len(draws)
    assert math.isclose(mean, 0.5772156649, abs_tol=4 * math.sqrt(math.pi**2 / 6 / len(draws)))
    assert math.isclose(variance, math.pi**2 / 6, rel_tol=0.06)


@pytest.mark.parametrize("over", ["position", "seed"])
def test_the_greatest_noisy_logit_is_a_draw_from_the_softmax(over: str) -> None:
    logits = [2.0, 1.0, 0.0, 0.5, -1.0, 1.5]
    n = 6000
    keys = [noise_key(5, i) if over == "position" else noise_key(i, 17) for i in range(n)]
    counts = Counter(max(range(6), key=lambda t, k=key: logits[t] + gumbel(k, t)) for key in keys)
    total = sum(map(math.exp, logits))
    expected = [n * math.exp(x) / total for x in logits]
    assert chi_square([counts[t] for t in range(6)], expected) < 20.5  # 5 degrees, p = 0.001


@pytest.mark.parametrize("step", ["token", "position", "seed"])
def test_neighbours_are_not_correlated(step: str) -> None:
    n = 5000
    streams = {
        "token": [uniform(noise_key(3, 3), i) for i in range(n)],
        "position": [uniform(noise_key(3, i), 3) for i in range(n)],
        "seed": [uniform(noise_key(i, 3), 3) for i in range(n)],
    }
    centred = [u - 0.5 for u in streams[step]]
    for lag in (1, 2, 7):
        correlation = 12 * sum(a * b for a, b in zip(centred, centred[lag:], strict=False)) / n
        assert abs(correlation) < 4 / math.sqrt(n)


def test_one_bit_of_seed_or_position_changes_half_of_the_bits() -> None:
    for a, b in [((0, 0), (1, 0)), ((0, 0), (0, 1)), ((2**63, 5), (0, 5)), ((4, 4096), (4, 0))]:
        assert 12 <= (noise_key(*a) ^ noise_key(*b)).bit_count() <= 52


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
