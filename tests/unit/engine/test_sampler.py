"""The torch sampler against plain references: one row at a time, transformers' own filters, and itself cut anywhere."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.domain.request import SamplingParams, TokenLogprob
from cluster.engine import sampling
from cluster.engine.model.noise import gumbels, noise_keys, seed_base, token_steps, uniforms
from cluster.engine.model.penalties import TokenCounts, adjust
from cluster.engine.model.sampler import Sample, Sampler
from cluster.engine.model.token_filters import FilterParams, filter_tokens, weight_totals
from cluster.engine.step import SequenceStart

CPU = torch.device("cpu")
VOCABULARY = 50


# What is drawn is the same wherever the sampler works.
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
anywhere = pytest.mark.parametrize(
    "device", [CPU, pytest.param(torch.device("cuda"), marks=NO_GPU)], ids=["cpu", "cuda"]
)


@dataclass(frozen=True)
class Row:
    params: SamplingParams
    prompt: tuple[int, ...] = (1, 2, 3)
    generated: tuple[int, ...] = ()


def row(prompt: Sequence[int] = (1, 2, 3), generated: Sequence[int] = (), **params: object) -> Row:
    return Row(SamplingParams(max_tokens=1000, **params), tuple(prompt), tuple(generated))


def logits_of(seed: int, rows: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def sample(logits: torch.Tensor, rows: Sequence[Row], device: torch.device = CPU) -> list[Sample]:
    """One step of a fresh sampler; rows in slots that are not their indices."""
    sampler = Sampler(logits.shape[1], 2 * len(rows), device)
    slots = [2 * len(rows) - 1 - 2 * i for i in range(len(rows))]
    for slot, r in zip(slots, rows, strict=True):
        sampler.start(SequenceStart(slot, r.params, r.prompt, r.generated))
    return sampler.sample(logits.clone().to(device), slots)


# The plain reference: one row, one rule after the other.


def plainly(logits: torch.Tensor, r: Row) -> Sample:
    p, logits = r.params, logits.float().clone()
    for token, bias in p.logit_bias.items():
        logits[token] += bias
    if p.repetition_penalty != 1.0:
        for token in {*r.prompt, *r.generated}:
            logits[token] = (
                logits[token] * p.repetition_penalty if logits[token] < 0 else logits[token] / p.repetition_penalty
            )
    for token, count in Counter(r.generated).items():
        logits[token] -= p.presence_penalty + p.frequency_penalty * torch.tensor(count, dtype=torch.float32)
    if len(r.generated) < p.min_tokens:
        for token in p.stop_token_ids:
            if token < logits.numel():
                logits[token] = -math.inf
    token = int(logits.argmax()) if p.greedy else plain_draw(logits, r)
    if not p.logprobs:
        return Sample(token, None)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(p.logprobs, logprobs.numel()))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Sample(token, TokenLogprob(token, float(logprobs[token]), pairs))


def plain_draw(logits: torch.Tensor, r: Row) -> int:
    p = r.params
    scores = logits.double() / p.temperature
    if 0 < p.top_k < scores.numel():
        scores[scores < scores.topk(p.top_k).values[-1]] = -torch.inf
    if p.top_p < 1.0:
        ordered, order = scores.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        scores[order[before >= p.top_p]] = -torch.inf
    if p.min_p > 0.0:
        probabilities = scores.softmax(-1)
        scores[probabilities < p.min_p * probabilities.max()] = -torch.inf
    key = sampling.noise_key(p.seed, len(r.prompt) + len(r.generated))
    noise = [sampling.gumbel(key, token) for token in range(scores.numel())]
    return int((scores + torch.tensor(noise, dtype=torch.float64)).argmax())


def assert_same(got: Sample, expected: Sample) -> None:
    assert got.token_id == expected.token_id
    assert (got.logprob is None) == (expected.logprob is None)
    if got.logprob is None or expected.logprob is None:
        return
    assert got.logprob.token_id == expected.logprob.token_id
    assert got.logprob.logprob == pytest.approx(expected.logprob.logprob, abs=1e-5)
    assert [token for token, _ in got.logprob.top] == [token for token, _ in expected.logprob.top]
    for (_, ours), (_, theirs) in zip(got.logprob.top, expected.logprob.top, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def params_of(vocabulary: int) -> st.SearchStrategy[SamplingParams]:
    token = st.integers(0, vocabulary - 1)
    # Off every fraction of two small integers: there equal logits put a threshold on the last bit.
    share = st.integers(1, 998).map(lambda n: (n + math.pi / 10) / 1000)
    return st.builds(
        SamplingParams,
        max_tokens=st.just(1000),
        temperature=st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0, 1.7]),
        top_p=st.one_of(st.just(1.0), share),
        top_k=st.one_of(st.just(0), st.integers(1, vocabulary + 5)),
        min_p=st.one_of(st.just(0.0), share),
        seed=st.integers(0, 2**64 - 1),
        repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.0, -0.5, 0.75]),
        frequency_penalty=st.sampled_from([0.0, 0.0, -0.25, 1.5]),
        stop_token_ids=st.frozensets(st.integers(0, vocabulary + 3), max_size=min(3, vocabulary - 1)),  # never all
        min_tokens=st.integers(0, 6),
        logit_bias=st.dictionaries(token, st.sampled_from([-100.0, -2.0, 1.5, 4.0]), max_size=3),
        logprobs=st.sampled_from([0, 0, 1, 5, 400]),
    )


def rows_of(vocabulary: int) -> st.SearchStrategy[Row]:
    tokens = st.lists(st.integers(0, vocabulary - 1), max_size=8).map(tuple)
    return st.builds(Row, params_of(vocabulary), st.tuples(st.integers(0, vocabulary - 1)), tokens)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[Row]]:
    vocabulary = draw(st.sampled_from([3, 50, 300]))
    rows = draw(st.lists(rows_of(vocabulary), min_size=1, max_size=6))
    logits = logits_of(draw(st.integers(0, 2**32)), len(rows), vocabulary)
    # Coarse logits: many are equal, and equals at a threshold are where filters go wrong.
    coarse = draw(st.sampled_from([0.0, 0.5, 2.0]))
    return (logits / coarse).round() * coarse if coarse else logits, rows


@anywhere
@given(batches())
@settings(deadline=None, max_examples=150)
def test_a_batch_gives_what_the_plain_reference_gives_row_by_row(
    device: torch.device, batch: tuple[torch.Tensor, list[Row]]
) -> None:
    logits, rows = batch
    assert_samples = sample(logits, rows, device)
    for i, r in enumerate(rows):
        expected = plainly(logits[i], r)
        if r.params.logprobs and len(set(logits[i].tolist())) < logits.shape[1]:
            # torch's topk leaves the order of equals open; alone and together it is one order (next test).
            expected = replace(expected, logprob=assert_samples[i].logprob)
        assert_same(assert_samples[i], expected)


@given(batches(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_a_token_does_not_depend_on_what_shares_the_batch(
    batch: tuple[torch.Tensor, list[Row]], chance: random.Random
) -> None:
    logits, rows = batch
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    order = list(range(len(rows)))
    chance.shuffle(order)
    assert [together[i] for i in order] == sample(logits[order], [rows[i] for i in order])


# Runs of several tokens: a model whose logits are a hash of the tokens so far, coarse so that logits are often equal.


def model(tokens: Sequence[int], vocabulary: int = VOCABULARY) -> torch.Tensor:
    state = 17
    for token in tokens:
        state = sampling.mix64(state + token)
    bits = uniforms(torch.tensor([state - 2**63]), token_steps(torch.arange(vocabulary)))
    return (bits[0] * 12).round().float() / 2


def run(sampler: Sampler, slot: int, r: Row, device: torch.device = CPU) -> list[Sample]:
    """Until the output is complete or a stop token comes, which is no part of it."""
    sampler.start(SequenceStart(slot, r.params, r.prompt, r.generated))
    tokens, samples = [*r.prompt, *r.generated], list[Sample]()
    while len(tokens) - len(r.prompt) < r.params.max_tokens:
        [found] = sampler.sample(model(tokens)[None].to(device), [slot])
        if found.token_id in r.params.stop_token_ids:
            break
        tokens.append(found.token_id)
        samples.append(found)
    return samples


PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3}
RUNS = {
    "greedy": {},
    "greedy, everything": PENALTIES | {"min_tokens": 9, "logit_bias": {3: 1.5, 7: -2.0}, "logprobs": 3},
    "seeded": {"temperature": 1.1, "seed": 2**63 + 5},
    "seeded, filters": {"temperature": 0.8, "seed": 3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "logprobs": 1},
    "seeded, everything": PENALTIES
    | {"temperature": 1.5, "seed": 8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "min_tokens": 9, "logprobs": 2}
    | {"logit_bias": {3: 1.5, 7: -2.0, 0: 1.0}},
    "presence alone": {"temperature": 0.9, "seed": 1, "presence_penalty": 1.0},
}


@anywhere
@pytest.mark.parametrize("name", RUNS)
def test_a_run_cut_anywhere_goes_on_as_if_it_had_not_been(name: str, device: torch.device) -> None:
    stops = frozenset({0, 5}) if "min_tokens" in RUNS[name] else frozenset({49})
    params = SamplingParams(max_tokens=24, stop_token_ids=stops, **RUNS[name])
    sampler = Sampler(VOCABULARY, 3, device)
    whole = run(sampler, 0, Row(params), device)
    assert len(whole) >= max(3, params.min_tokens)
    tokens = tuple(s.token_id for s in whole)
    for k in range(len(whole) + 1):
        # In the slot of the run before (its history must be gone), and on another replica.
        for again in (
            run(sampler, 0, Row(params, generated=tokens[:k]), device),
            run(fresh(device), 2, Row(params, (1, 2, 3), tokens[:k]), device),
        ):
            assert again == whole[k:], f"cut at {k}"


def test_min_tokens_delays_a_stop_that_would_have_come() -> None:
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=4, stop_token_ids=frozenset(range(0, 50, 2)))
    free = run(fresh(), 0, Row(params))
    held = run(fresh(), 0, Row(replace(params, min_tokens=12)))
    assert len(free) < 12 <= len(held)


def fresh(device: torch.device = CPU) -> Sampler:
    return Sampler(VOCABULARY, 4, device)


@given(st.lists(rows_of(VOCABULARY), min_size=2, max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_histories_keep_apart_in_changing_batches(rows: list[Row], chance: random.Random) -> None:
    """Some slots step, others wait, some begin anew (a preemption): all draw what they would have drawn alone."""
    sampler = Sampler(VOCABULARY, len(rows), CPU)
    tokens = [list(r.generated) for r in rows]

    def begin(slot: int) -> None:
        sampler.start(SequenceStart(slot, rows[slot].params, rows[slot].prompt, tuple(tokens[slot])))

    for slot in range(len(rows)):
        begin(slot)
    for _ in range(8):
        slots = chance.sample(range(len(rows)), chance.randint(1, len(rows)))
        if chance.random() < 0.3:
            begin(slots[0])
        logits = torch.stack([model([*rows[s].prompt, *tokens[s]]) for s in slots])
        for slot, got in zip(slots, sampler.sample(logits.clone(), slots), strict=True):
            now = replace(rows[slot], generated=tuple(tokens[slot]))
            assert got.token_id == plainly(model([*now.prompt, *now.generated]), now).token_id
            tokens[slot].append(got.token_id)


# Noise.


@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_noise_is_the_reference_bit_for_bit(seed: int, position: int) -> None:
    key = sampling.noise_key(seed, position)
    keys = noise_keys(torch.tensor([seed_base(seed)]), torch.tensor([position]))
    steps = token_steps(torch.arange(64))
    assert int(keys[0]) % 2**64 == key
    assert uniforms(keys, steps)[0].tolist() == [sampling.uniform(key, token) for token in range(64)]
    assert gumbels(keys, steps)[0].tolist() == pytest.approx([sampling.gumbel(key, t) for t in range(64)], rel=1e-13)


def test_noise_of_chosen_tokens_is_their_part_of_the_noise_of_all() -> None:
    keys = noise_keys(torch.tensor([seed_base(1), seed_base(2)]), torch.tensor([5, 6]))
    chosen = torch.tensor([[3, 60], [9, 0]])
    of_all = uniforms(keys, token_steps(torch.arange(64)))
    assert torch.equal(uniforms(keys, token_steps(chosen)), of_all.gather(1, chosen))


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


# Filters.

FILTERS = [
    {"temperature": 0.7},
    {"top_k": 40},
    {"top_k": 100, "temperature": 1.3},
    {"top_p": 0.8},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.05},
    {"min_p": 1e-6, "temperature": 1.5},
    {"top_k": 1500, "top_p": 0.95},
    {"top_k": 20, "top_p": 0.6, "min_p": 0.1, "temperature": 0.9, "repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "top_p": 0.5},
]


@pytest.mark.parametrize("vocabulary", [60, 3000])
@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_the_filtered_distribution_is_transformers_own(wanted: dict[str, float], vocabulary: int) -> None:
    from transformers.generation import logits_process as theirs

    r = row(prompt=range(20), generated=(30, 31, 30), **{"temperature": 1.0, **wanted})
    p, logits = r.params, logits_of(11, 4, vocabulary)
    chain = theirs.LogitsProcessorList([theirs.TemperatureLogitsWarper(p.temperature)])
    if p.repetition_penalty != 1.0:
        chain.insert(0, theirs.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.top_k:
        chain.append(theirs.TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        chain.append(theirs.TopPLogitsWarper(p.top_p))
    if p.min_p:
        chain.append(theirs.MinPLogitsWarper(p.min_p))
    known = torch.tensor([[*r.prompt, *r.generated]] * 4)
    expected = chain(known, logits.clone().double()).softmax(-1)
    torch.testing.assert_close(distribution(logits, r), expected, atol=1e-6, rtol=1e-4)


def distribution(logits: torch.Tensor, r: Row) -> torch.Tensor:
    """What the sampler draws from, ``[rows, vocabulary]``, through its own parts."""
    sampler = Sampler(logits.shape[1], 1, CPU)
    sampler.start(SequenceStart(0, r.params, r.prompt, r.generated))
    adjusted = logits.clone()
    if sampler._adjusted:
        adjust(adjusted, range(len(logits)), [sampler._adjusted[0]] * len(logits))
    params = sampler._filters.rows(torch.zeros(len(logits), dtype=torch.int64))
    found = filter_tokens(adjusted, params, weight_totals(adjusted, params), logits.shape[1])
    kept = torch.where(found.kept, found.scores, -torch.inf).softmax(-1)
    return torch.zeros_like(kept).scatter(1, found.token_ids, kept)


@given(
    st.integers(0, 2**32), st.integers(0, 1200), st.floats(0.01, 1.0), st.floats(0.0, 0.5), st.sampled_from([0.1, 1, 9])
)
@settings(deadline=None, max_examples=100)
def test_few_candidates_settle_only_what_all_of_them_would(
    seed: int, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    vocabulary, rows = 1100, 3
    logits = (logits_of(seed, rows, vocabulary) * spread * 4).round() / 4
    params = FilterParams(
        torch.full((rows,), 0.9, dtype=torch.float64),
        torch.full((rows,), top_k if top_k < vocabulary else 0),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.full((rows,), min_p, dtype=torch.float64),
    )
    totals = weight_totals(logits, params)
    everything = filter_tokens(logits, params, totals, vocabulary)
    assert bool(everything.settled.all())
    for width in (8, 64, 1024):
        few = filter_tokens(logits, params, totals, width)
        for i in few.settled.nonzero()[:, 0].tolist():
            assert few.token_ids[i, few.kept[i]].tolist() == everything.token_ids[i, everything.kept[i]].tolist()


def test_a_row_settles_with_few_candidates_when_it_can() -> None:
    params = FilterParams(*(torch.tensor([x], dtype=torch.float64) for x in (1.0, 50, 0.9, 0.0)))
    params = replace(params, top_k=params.top_k.long())
    logits = logits_of(1, 1, 4096)
    assert filter_tokens(logits, params, torch.ones(1), 64).settled.tolist() == [True]
    assert filter_tokens(logits * 0, params, torch.ones(1), 64).settled.tolist() == [False], "all are equal"


# Formulas.


def test_greedy_is_argmax_and_the_smaller_of_equals() -> None:
    logits = logits_of(0, rows=4)
    assert [s.token_id for s in sample(logits, [row()] * 4)] == logits.argmax(-1).tolist()
    assert sample(torch.tensor([[1.0, 5.0, 5.0]]), [row()])[0].token_id == 1
    assert sample(torch.tensor([[1.0, 5.0, 5.0]]).bfloat16(), [row()])[0].token_id == 1


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


def test_no_stop_token_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    stops = frozenset({0})
    assert sample(logits, [row(stop_token_ids=stops, min_tokens=2, generated=(1,))])[0].token_id == 1
    assert sample(logits, [row(stop_token_ids=stops, min_tokens=2, generated=(1, 1))])[0].token_id == 0


def test_an_end_token_beyond_the_vocabulary_can_never_come() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    assert sample(logits, [row(stop_token_ids=frozenset({0, 99}), min_tokens=2)])[0].token_id == 1
    assert sample(logits, [row(stop_token_ids=frozenset({99}), min_tokens=2)])[0].token_id == 0


def test_logprobs_are_natural_and_before_temperature() -> None:
    logits = logits_of(5)
    got = sample(logits, [row(temperature=0.1, seed=1, logprobs=2)])[0]
    assert got.logprob is not None
    expected = logits[0].double().log_softmax(-1)
    assert math.isclose(got.logprob.logprob, float(expected[got.token_id]), abs_tol=1e-5)
    assert [token for token, _ in got.logprob.top] == expected.topk(2).indices.tolist()


def test_a_slot_forgets_who_was_there_before() -> None:
    sampler = fresh()
    loaded = SamplingParams(
        max_tokens=9, temperature=1.0, top_k=5, logit_bias={4: 99.0}, logprobs=2, presence_penalty=1
    )
    sampler.start(SequenceStart(1, loaded, (1,), ()))
    assert sampler.sample(logits_of(1), [1])[0].logprob is not None
    sampler.start(SequenceStart(1, SamplingParams(max_tokens=9), (1,), ()))
    assert sampler.sample(logits_of(1), [1]) == [Sample(int(logits_of(1).argmax()), None)]


@given(st.lists(st.integers(0, 300), max_size=200), st.lists(st.integers(0, 300), max_size=400))
@settings(deadline=None, max_examples=50)
def test_token_counts_are_counters(prompt: list[int], generated: list[int]) -> None:
    seen = TokenCounts(prompt, generated)
    expected = Counter(generated) | Counter(dict.fromkeys(prompt, 0))
    assert dict(zip(seen.token_ids.tolist(), seen.counts.tolist(), strict=True)) == {
        token: expected[token] for token in {*prompt, *generated}
    }
