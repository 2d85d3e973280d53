"""From logits to tokens: bias, penalties, temperature, filters, and Gumbel-max with counter-based noise.

Gumbel-max (Gumbel 1954; Maddison et al. 2014): argmax(logit / temperature + g) with g = -log(-log u) draws from the
softmax. The noise u is a hash of (seed, position, token id), so a token is the same on every replica, whatever shares
the batch, and after any preemption or failover. ``cluster.engine.sampling`` states the hash in plain integers; here
it is in tensors, bit for bit the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.domain.request import SamplingParams, TokenLogprob
from cluster.engine.sampling import GOLDEN, LARGEST_UNIFORM, MIX_1, MIX_2, noise_key


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits: whose it is. ``position``: index of the token to come in prompt + output."""

    params: SamplingParams
    prompt: Sequence[int]
    generated: Sequence[int]

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.generated)


@dataclass(frozen=True, slots=True)
class Sample:
    """The token, and its log-probabilities when they were asked for."""

    token_id: int
    logprob: TokenLogprob | None


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sample]:
    """One token for each row of ``logits`` ``[rows, vocabulary]`` (any float type; computed in float32)."""
    assert logits.shape[0] == len(rows)
    logits = logits.float()
    touched = [i for i, row in enumerate(rows) if _is_adjusted(row)]
    if touched:
        logits = logits.clone()
        for i in touched:
            _adjust(logits[i], rows[i])
    chosen = logits.argmax(dim=-1)
    random_rows = [i for i, row in enumerate(rows) if not row.params.greedy]
    if random_rows:
        chosen[random_rows] = _draw(logits[random_rows], [rows[i] for i in random_rows])
    tokens = chosen.tolist()
    return [
        Sample(token, _logprobs(logits[i], token, rows[i].params.logprobs))
        for i, token in enumerate(tokens)
    ]  # fmt: skip


def _is_adjusted(row: SampleRow) -> bool:
    p = row.params
    return bool(
        p.logit_bias
        or p.repetition_penalty != 1.0
        or p.presence_penalty
        or p.frequency_penalty
        or (p.stop_token_ids and len(row.generated) < p.min_tokens)
    )


def _adjust(logits: torch.Tensor, row: SampleRow) -> None:
    """Bias, penalties and the ban on stopping before ``min_tokens``, in place on one row.

    repetition: Keskar et al. 2019 (CTRL), over prompt and output, as transformers does it; presence and frequency:
    as OpenAI's API documents them, over the output.
    """
    p = row.params
    if p.logit_bias:
        ids = torch.tensor(list(p.logit_bias), dtype=torch.long, device=logits.device)
        logits[ids] += torch.tensor(list(p.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if p.repetition_penalty != 1.0:
        ids = torch.tensor(sorted({*row.prompt, *row.generated}), dtype=torch.long, device=logits.device)
        seen = logits[ids]
        logits[ids] = torch.where(seen < 0, seen * p.repetition_penalty, seen / p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and row.generated:
        output = torch.tensor(list(row.generated), dtype=torch.long, device=logits.device)
        ids, counts = output.unique(return_counts=True)
        logits[ids] -= p.presence_penalty + p.frequency_penalty * counts.to(logits.dtype)
    if p.stop_token_ids and len(row.generated) < p.min_tokens:
        # An end token beyond the vocabulary can never come.
        stops = sorted(token for token in p.stop_token_ids if token < logits.numel())
        logits[torch.tensor(stops, dtype=torch.long, device=logits.device)] = -torch.inf


def _draw(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Gumbel-max over what the filters leave: ``[rows]`` token ids."""
    device = logits.device
    temperature = torch.tensor([row.params.temperature for row in rows], dtype=torch.float64, device=device)
    scores = logits.double() / temperature[:, None]
    for i, row in enumerate(rows):
        _filter(scores[i], row.params)
    keys = [noise_key(row.params.seed, row.position) for row in rows]
    noise = -torch.log(-torch.log(uniforms(keys, logits.shape[-1], device)))
    return (scores + noise).argmax(dim=-1)


def _filter(scores: torch.Tensor, params: SamplingParams) -> None:
    """top-k, then top-p (Holtzman et al. 2019), then min-p (Nguyen et al. 2024), in place on one row of scores."""
    if 0 < params.top_k < scores.numel():
        threshold = scores.topk(params.top_k).values[-1]
        scores[scores < threshold] = -torch.inf
    if params.top_p < 1.0:
        ordered, order = scores.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        scores[order[before >= params.top_p]] = -torch.inf
    if params.min_p > 0.0:
        probabilities = scores.softmax(-1)
        scores[probabilities < params.min_p * probabilities.max()] = -torch.inf


def uniforms(keys: Sequence[int], count: int, device: torch.device) -> torch.Tensor:
    """``[len(keys), count]`` float64 in (0, 1): ``sampling.uniform(key, token_id)`` for all token ids."""
    steps = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(GOLDEN)
    x = torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device)[:, None] + steps
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
    x = x ^ _shift_right(x, 31)
    return ((_shift_right(x, 11).double() + 0.5) / 2.0**53).clamp(max=LARGEST_UNIFORM)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift: torch's own is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _logprobs(logits: torch.Tensor, token: int, count: int) -> TokenLogprob | None:
    if count == 0:
        return None
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(count, logprobs.numel()))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), pairs)
