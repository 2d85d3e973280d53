"""Counter-based noise for sampling: the reference that every sampler must reproduce.

A token is drawn by the Gumbel-max rule: the token with the greatest ``logit / temperature + gumbel`` among
those that top-k, top-p and min-p leave. The noise is a pure function of (seed, position, token id), where
position is the index of the token being generated in the whole sequence, prompt included. So a token does
not depend on what shares the batch, on chunks, on preemption, or on the replica that computes it, and no
state has to travel with a sequence that moves.

All integers are unsigned 64-bit and wrap. ``mix64`` is the output function of splitmix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014); ``GOLDEN`` is its increment::

    key     = mix64(mix64(seed + GOLDEN) + (position + 1) * GOLDEN)
    hash    = mix64(key + (token_id + 1) * GOLDEN)
    uniform = min(((hash >> 11) + 0.5) / 2**53, 1 - 2**-53)      in float64
    gumbel  = -log(-log(uniform))                                in float64

The minimum matters for one hash value in 2**53: there the sum rounds up to 2**53, and without it the uniform
would be 1 and the noise infinite.
"""

from __future__ import annotations

import math

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
LARGEST_UNIFORM = 1.0 - 2.0**-53

_MASK = 2**64 - 1


def mix64(value: int) -> int:
    """A bijection of 64-bit integers with full avalanche."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * MIX_2) & _MASK
    return value ^ (value >> 31)


def noise_key(seed: int, position: int) -> int:
    """The key of all noise at ``position`` (from 0, prompt included) of a sequence with ``seed``."""
    assert 0 <= seed <= _MASK, seed
    assert position >= 0, position
    return mix64(mix64(seed + GOLDEN) + (position + 1) * GOLDEN)


def token_hash(key: int, token_id: int) -> int:
    """64 random bits of one token under one key."""
    return mix64(key + (token_id + 1) * GOLDEN)


def unit_interval(bits: int) -> float:
    """The top 53 of 64 bits as a float64 strictly between 0 and 1."""
    return min(((bits >> 11) + 0.5) / 2.0**53, LARGEST_UNIFORM)


def uniform(key: int, token_id: int) -> float:
    """Uniform noise of one token, strictly between 0 and 1."""
    return unit_interval(token_hash(key, token_id))


def gumbel(key: int, token_id: int) -> float:
    """Standard Gumbel noise of one token; finite, in about -3.7 .. 36.8."""
    return -math.log(-math.log(uniform(key, token_id)))
