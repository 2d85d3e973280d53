"""The torch sampler against plain references."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.domain.request import SamplingParams
from cluster.engine import sampling
from cluster.engine.model.sampler import SampleRow, sample, uniforms

CPU = torch.device("cpu")
VOCABULARY = 50


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def row(prompt=(1, 2, 3), generated=(), **params) -> SampleRow:
    return SampleRow(SamplingParams(max_tokens=10, **params), prompt, generated)


@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_noise_is_the_reference_bit_for_bit(seed: int, position: int) -> None:
    key = sampling.noise_key(seed, position)
    assert uniforms([key], 64, CPU)[0].tolist() == [sampling.uniform(key, token) for token in range(64)]


def test_greedy_is_argmax() -> None:
    logits = logits_of(0, rows=4)
    assert [s.token_id for s in sample(logits, [row()] * 4)] == logits.argmax(-1).tolist()


def test_a_token_does_not_depend_on_what_shares_the_batch() -> None:
    logits = logits_of(1, rows=6)
    rows = [row(prompt=(1,) * (i + 1), temperature=0.9, seed=i, top_k=20, top_p=0.9, min_p=0.01) for i in range(6)]
    together = [s.token_id for s in sample(logits, rows)]
    alone = [sample(logits[i : i + 1], [rows[i]])[0].token_id for i in range(6)]
    order = list(range(6))
    random.Random(0).shuffle(order)
    shuffled = [s.token_id for s in sample(logits[order], [rows[i] for i in order])]
    assert together == alone
    assert [together[i] for i in order] == shuffled


def test_last_bit_noise_does_not_change_tokens() -> None:
    rows = [row(prompt=(1,) * (i + 1), temperature=1.0, seed=i) for i in range(300)]
    logits = logits_of(2).repeat(300, 1)
    noisy = logits + 1e-6 * torch.randn(300, VOCABULARY, generator=torch.Generator().manual_seed(9))
    assert [s.token_id for s in sample(logits, rows)] == [s.token_id for s in sample(noisy, rows)]


def test_draws_follow_the_softmax() -> None:
    draws = 4000
    logits = logits_of(3)
    tokens = sample(logits.repeat(draws, 1), [row(temperature=2.0, seed=s) for s in range(draws)])
    counts = torch.bincount(torch.tensor([t.token_id for t in tokens]), minlength=VOCABULARY).double()
    expected = (logits[0].double() / 2.0).softmax(-1) * draws
    chi_square = float(((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 5].sum())
    assert chi_square < 2.0 * int((expected > 5).sum())


def kept(**params) -> set[int]:
    logits = logits_of(4)
    return {sample(logits, [row(temperature=5.0, seed=s, **params)])[0].token_id for s in range(800)}


def test_filters_keep_what_their_definitions_say() -> None:
    probabilities = (logits_of(4)[0].double() / 5.0).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    assert kept(top_k=3) == set(order[:3])
    nucleus, mass = set(), 0.0
    for token in order:
        if mass >= 0.3:
            break
        nucleus.add(token)
        mass += float(probabilities[token])
    assert kept(top_p=0.3) == nucleus
    strong = {t for t in order if probabilities[t] >= 0.5 * probabilities.max()}
    assert kept(min_p=0.5) == strong


def test_penalties_and_bias_follow_their_formulas() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0]])
    adjusted = row(
        prompt=(0, 1), generated=(3, 3), repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5,
        logit_bias={2: 1.0}, logprobs=4,
    )  # fmt: skip
    expected = torch.tensor([1.0, -2.0, 1.5, 1.5 - 0.25 - 2 * 0.5]).log_softmax(-1)
    got = sample(logits, [adjusted])[0].logprob
    assert got is not None
    assert dict(got.top) == pytest.approx({i: float(p) for i, p in enumerate(expected)})
    assert logits.tolist() == [[2.0, -1.0, 0.5, 3.0]], "the caller's logits stay as they were"


def test_no_stop_token_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    stops = frozenset({0})
    assert sample(logits, [row(stop_token_ids=stops, min_tokens=2, generated=(1,))])[0].token_id == 1
    assert sample(logits, [row(stop_token_ids=stops, min_tokens=2, generated=(1, 1))])[0].token_id == 0


def test_logprobs_are_natural_and_before_temperature() -> None:
    logits = logits_of(5)
    got = sample(logits, [row(temperature=0.1, seed=1, logprobs=2)])[0]
    assert got.logprob is not None
    expected = logits[0].double().log_softmax(-1)
    assert math.isclose(got.logprob.logprob, float(expected[got.token_id]), abs_tol=1e-5)
    assert [token for token, _ in got.logprob.top] == expected.topk(2).indices.tolist()


def test_an_end_token_beyond_the_vocabulary_can_never_come() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    assert sample(logits, [row(stop_token_ids=frozenset({0, 99}), min_tokens=2)])[0].token_id == 1
