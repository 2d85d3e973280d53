"""Bias, penalties and the ban on stopping, for all rows of a batch at once and only where a token is touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cluster.domain.request import SamplingParams
from cluster.engine.step import SequenceStart

_FIRST_CAPACITY = 64


class TokenCounts:
    """The tokens of one sequence, each once, with how often each came in the output.

    12 bytes for each different token of the prompt and the output (24 while it grows), where a row over the
    vocabulary would cost 5 bytes for each token id that there is: 641 KB at a vocabulary of 128,256.
    """

    def __init__(self, prompt: Sequence[int], generated: Sequence[int]) -> None:
        seen = dict.fromkeys(prompt)
        capacity = max(_FIRST_CAPACITY, 2 * len(seen))
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._counts = np.zeros(capacity, dtype=np.float32)
        self._ids[: len(seen)] = list(seen)
        self._index = {token: i for i, token in enumerate(seen)}
        for token in generated:
            self.append(token)

    def append(self, token_id: int) -> None:
        """One more token of the output."""
        place = self._index.setdefault(token_id, len(self._index))
        if place == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1

    @property
    def token_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Float32, exact up to 2**24."""
        return self._counts[: len(self._index)]


class Adjustment:
    """What one sequence does to its logits before sampling; ``active`` says whether it still does anything."""

    def __init__(self, start: SequenceStart, vocab_size: int) -> None:
        params, self.num_generated = start.params, len(start.generated_token_ids)
        self.params = params
        self.bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self.bias_values = np.array(list(params.logit_bias.values()), dtype=np.float32)
        # An end token beyond the vocabulary can never come.
        stops = sorted(token for token in params.stop_token_ids if token < vocab_size)
        self._stop_ids = np.array(stops, dtype=np.int64)
        self.seen = _seen(params, start)

    @property
    def banned_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return self._stop_ids[: self._stop_ids.size if self._bans else 0]

    @property
    def active(self) -> bool:
        return bool(self.bias_ids.size) or self.seen is not None or self._bans

    @property
    def _bans(self) -> bool:
        return self.num_generated < self.params.min_tokens and self._stop_ids.size > 0

    def append(self, token_id: int) -> None:
        self.num_generated += 1
        if self.seen is not None:
            self.seen.append(token_id)


def _seen(params: SamplingParams, start: SequenceStart) -> TokenCounts | None:
    repetition = params.repetition_penalty != 1.0
    if not (repetition or params.presence_penalty or params.frequency_penalty):
        return None
    return TokenCounts(start.prompt_token_ids if repetition else (), start.generated_token_ids)


def adjust(logits: torch.Tensor, rows: Sequence[int], adjustments: Sequence[Adjustment]) -> None:
    """Changes the named rows of ``logits`` (float32, contiguous, ``[rows, vocabulary]``) in place.

    Bias first, then the penalties, then the ban before ``min_tokens``. repetition: Keskar et al. 2019 (CTRL), over
    prompt and output, as transformers does it; presence and frequency: as OpenAI's API documents them, over the output.
    """
    flat, width = logits.view(-1), logits.shape[-1]
    bias = _places([a.bias_ids for a in adjustments], rows, width)
    if bias.size:
        flat[_tensor(bias, logits)] += _tensor(np.concatenate([a.bias_values for a in adjustments]), logits)
    penalised = [(row, a.params, a.seen) for row, a in zip(rows, adjustments, strict=True) if a.seen is not None]
    if penalised:
        _penalise(flat, width, penalised)
    banned = _places([a.banned_ids for a in adjustments], rows, width)
    if banned.size:
        flat[_tensor(banned, logits)] = -torch.inf


def _penalise(flat: torch.Tensor, width: int, rows: Sequence[tuple[int, SamplingParams, TokenCounts]]) -> None:
    places = _tensor(_places([seen.token_ids for _, _, seen in rows], [row for row, _, _ in rows], width), flat)
    counts = _tensor(np.concatenate([seen.counts for _, _, seen in rows]), flat)
    each = [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for _, p, _ in rows]
    sizes = [seen.token_ids.size for _, _, seen in rows]
    repetition, presence, frequency = _tensor(np.repeat(np.array(each, dtype=np.float32), sizes, axis=0).T, flat)
    logits = flat[places]
    logits = torch.where(logits < 0, logits * repetition, logits / repetition)
    flat[places] = logits - torch.where(counts > 0, presence + frequency * counts, 0.0)


def _places(
    token_ids: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]], rows: Sequence[int], width: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Indices into the flat logits."""
    sizes = [ids.size for ids in token_ids]
    return np.concatenate(token_ids) + np.repeat(np.asarray(rows, dtype=np.int64) * width, sizes)


def _tensor(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)
