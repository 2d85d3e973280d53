"""The noise of ``cluster.engine.sampling`` in tensors, bit for bit the same up to the two logarithms."""

from __future__ import annotations

import torch

from cluster.engine.sampling import GOLDEN, LARGEST_UNIFORM, MIX_1, MIX_2


def token_steps(token_ids: torch.Tensor) -> torch.Tensor:
    """What a key is advanced by for each token id: ``(token_id + 1) * GOLDEN``, wrapping; int64 of the same shape."""
    return (token_ids + 1) * signed(GOLDEN)


def seed_base(seed: int) -> int:
    """``sampling.mix64(seed + GOLDEN)`` as an int64: the part of a key that never changes in a sequence."""
    return int(_mix(torch.tensor([signed((seed + GOLDEN) % 2**64)], dtype=torch.int64)))


def noise_keys(bases: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``sampling.noise_key`` for each row; int64 ``[rows]``."""
    return _mix(bases + (positions + 1) * signed(GOLDEN))


def uniforms(keys: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """``sampling.uniform`` in float64, ``[rows, n]``: ``keys`` are ``[rows]``, ``steps`` ``[n]`` or ``[rows, n]``."""
    bits = _shift_right(_mix(keys[:, None] + steps), 11)
    return bits.double().add_(0.5).mul_(2.0**-53).clamp_(max=LARGEST_UNIFORM)


def gumbels(keys: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise in float64, ``[rows, n]``; arguments as for ``uniforms``."""
    return uniforms(keys, steps).log_().neg_().log_().neg_()


def signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - 2**64 if value >= 2**63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """``sampling.mix64``, in place."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(signed(MIX_1))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(signed(MIX_2))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift: torch's own is arithmetic on int64."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
