"""From logits to tokens: bias, penalties, temperature, filters, and Gumbel-max with counter-based noise.

Gumbel-max (Gumbel 1954; Maddison et al. 2014): argmax(logit / temperature + g) with g = -log(-log u) draws from the
softmax. The noise u is a hash of (seed, position, token id), so a token is the same on every replica, whatever shares
the batch, and after any preemption or failover. ``cluster.engine.sampling`` states the hash in plain integers.

A batch is worked on as a whole; every operation treats a row in the same way whatever the other rows are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.domain.request import SamplingParams, TokenLogprob
from cluster.engine.model.noise import gumbels, noise_keys, seed_base, token_steps
from cluster.engine.model.penalties import Adjustment, adjust
from cluster.engine.model.token_filters import WIDTHS, FilterParams, filter_tokens, weight_totals
from cluster.engine.step import SequenceStart

# Logits worked on in one pass. Noise for whole rows stays in a CPU's cache with the smaller number; the larger one
# bounds what a pass takes beside the logits: 64 MiB for each float64 it makes.
_CACHE_BLOCK, _LARGEST_BLOCK = 1 << 17, 1 << 23


@dataclass(frozen=True, slots=True)
class Sample:
    """The token, and its log-probabilities when they were asked for."""

    token_id: int
    logprob: TokenLogprob | None


class Sampler:
    """Draws the next token of up to ``max_num_seqs`` sequences, each known by its slot.

    ``start`` tells it all of a sequence; from then on it appends what it draws. Memory that stays: 40 bytes for each
    slot, 8 for each token id of the vocabulary, and 12 for each different token of a sequence with penalties
    (``TokenCounts``). Nothing is as large as ``[max_num_seqs, vocab_size]``. Nothing here is thread-safe.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        assert min(vocab_size, max_num_seqs) >= 1, (vocab_size, max_num_seqs)
        self._vocab_size = vocab_size
        self._plain_block = _CACHE_BLOCK if device.type == "cpu" else _LARGEST_BLOCK
        self._steps = token_steps(torch.arange(vocab_size, dtype=torch.int64, device=device))
        self._bases = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._filters = FilterParams(
            torch.ones(max_num_seqs, dtype=torch.float64, device=device),
            torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
            torch.ones(max_num_seqs, dtype=torch.float64, device=device),
            torch.zeros(max_num_seqs, dtype=torch.float64, device=device),
        )
        # Slots by what they need; one in none of these is greedy and nothing is kept of it.
        self._adjusted: dict[int, Adjustment] = {}
        self._random: set[int] = set()
        self._filtered: set[int] = set()
        self._logprobs: dict[int, int] = {}

    def start(self, start: SequenceStart) -> None:
        """A sequence takes its slot, anew or again; what was there before is forgotten."""
        slot, params = start.slot, start.params
        assert 0 <= slot < self._bases.numel(), slot
        self._forget(slot)
        adjustment = Adjustment(start, self._vocab_size)
        if adjustment.active:
            self._adjusted[slot] = adjustment
        if params.logprobs:
            self._logprobs[slot] = params.logprobs
        if not params.greedy:
            self._start_random(slot, params)
            self._positions[slot] = len(start.prompt_token_ids) + len(start.generated_token_ids)

    def sample(self, logits: torch.Tensor, slots: Sequence[int]) -> list[Sample]:
        """One token for each row of ``logits`` ``[len(slots), vocabulary]``; computed in float32, scores in float64.

        ``logits`` may be changed in place. Each slot occurs once.
        """
        assert logits.shape == (len(slots), self._vocab_size), (logits.shape, len(slots), self._vocab_size)
        adjusted = [row for row, slot in enumerate(slots) if slot in self._adjusted]
        random = [row for row, slot in enumerate(slots) if slot in self._random]
        told = [row for row, slot in enumerate(slots) if slot in self._logprobs]
        if not (adjusted or random or told):
            return [Sample(token, None) for token in _argmax(logits)]
        logits = logits.float().contiguous()
        if adjusted:
            adjust(logits, adjusted, [self._adjusted[slots[row]] for row in adjusted])
        tokens = _argmax(logits) if len(random) < len(slots) else [0] * len(slots)
        if random:
            for row, token in zip(random, self._draw(logits, slots, random), strict=True):
                tokens[row] = token
        logprobs = self._logprobs_of(logits, tokens, slots, told)
        for row in adjusted:
            self._append(slots[row], tokens[row])
        return [Sample(token, logprobs.get(row)) for row, token in enumerate(tokens)]

    def _forget(self, slot: int) -> None:
        self._adjusted.pop(slot, None)
        self._logprobs.pop(slot, None)
        self._random.discard(slot)
        self._filtered.discard(slot)

    def _start_random(self, slot: int, params: SamplingParams) -> None:
        self._random.add(slot)
        self._bases[slot] = seed_base(params.seed)
        self._filters.temperature[slot] = params.temperature
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else 0
        self._filters.top_k[slot] = top_k
        self._filters.top_p[slot] = params.top_p
        self._filters.min_p[slot] = params.min_p
        if top_k or params.top_p < 1.0 or params.min_p > 0.0:
            self._filtered.add(slot)

    def _append(self, slot: int, token_id: int) -> None:
        adjustment = self._adjusted[slot]
        adjustment.append(token_id)
        if not adjustment.active:
            del self._adjusted[slot]

    def _draw(self, logits: torch.Tensor, slots: Sequence[int], rows: list[int]) -> list[int]:
        """The tokens of the random ``rows``, in their order."""
        where = torch.tensor([slots[row] for row in rows], device=logits.device)
        keys = noise_keys(self._bases[where], self._positions[where])
        self._positions[where] += 1
        chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        picked = torch.tensor(rows, device=logits.device)
        filtered = [i for i, row in enumerate(rows) if slots[row] in self._filtered]
        plain = [i for i, row in enumerate(rows) if slots[row] not in self._filtered]
        for part, draw, block in (
            (plain, self._draw_plain, self._plain_block),
            (filtered, self._draw_filtered, _LARGEST_BLOCK),
        ):
            count = max(1, block // self._vocab_size)
            for first in range(0, len(part), count):
                at = torch.tensor(part[first : first + count], device=logits.device)
                chosen[at] = draw(logits[picked[at]], self._filters.rows(where[at]), keys[at])
        drawn: list[int] = chosen.tolist()
        return drawn

    def _draw_plain(self, logits: torch.Tensor, params: FilterParams, keys: torch.Tensor) -> torch.Tensor:
        scores = logits.double().div_(params.temperature[:, None])
        return scores.add_(gumbels(keys, self._steps)).argmax(-1)

    def _draw_filtered(self, logits: torch.Tensor, params: FilterParams, keys: torch.Tensor) -> torch.Tensor:
        chosen = torch.empty_like(keys)
        by_mass = (params.top_p < 1.0) & (params.top_k == 0)
        totals = torch.ones_like(params.top_p)
        if bool(by_mass.any()):
            rows = max(1, self._plain_block // self._vocab_size)
            for at in by_mass.nonzero()[:, 0].split(rows):
                totals[at] = weight_totals(logits[at], params.rows(at))
        pending = torch.arange(len(keys), device=logits.device)
        for width in (*(w for w in WIDTHS if w < self._vocab_size), self._vocab_size):
            found = filter_tokens(logits[pending], params.rows(pending), totals[pending], width)
            noise = gumbels(keys[pending], token_steps(found.token_ids))
            best = torch.where(found.kept, found.scores + noise, -torch.inf).argmax(-1, keepdim=True)
            settled = found.settled
            chosen[pending[settled]] = found.token_ids.gather(-1, best)[settled, 0]
            pending = pending[~settled]
            if not pending.numel():
                break
        return chosen

    def _logprobs_of(
        self, logits: torch.Tensor, tokens: Sequence[int], slots: Sequence[int], rows: Sequence[int]
    ) -> dict[int, TokenLogprob]:
        """By row. Rows that ask for equally many go together: how torch orders equals depends on the number."""
        found: dict[int, TokenLogprob] = {}
        for count in {self._logprobs[slots[row]] for row in rows}:
            asked = [row for row in rows if self._logprobs[slots[row]] == count]
            logprobs = logits[asked].log_softmax(-1)
            top = logprobs.topk(min(count, self._vocab_size), dim=-1)
            drawn = torch.tensor([tokens[row] for row in asked], device=logits.device)
            own = logprobs.gather(-1, drawn[:, None])[:, 0].tolist()
            pairs = zip(asked, own, top.indices.tolist(), top.values.tolist(), strict=True)
            for row, value, ids, values in pairs:
                found[row] = TokenLogprob(tokens[row], value, tuple(zip(ids, values, strict=True)))
        return found


def _argmax(logits: torch.Tensor) -> list[int]:
    """The smallest index of the greatest value of each row."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # NumPy's argmax uses wide vectors, torch's does not: 0.25 against 3.4 ms for 32 rows of 128,256.
        best: list[int] = logits.numpy().argmax(-1).tolist()
    else:
        best = logits.argmax(-1).tolist()
    return best
