"""Random lives of a whole engine with a real model: its tokens are those of transformers, whatever happens around them.

What is real: ShardedCausalLM with its paged cache, the scheduler, the sampler, the leader's runner and loop, all in this
process. The reference knows no cache and no batch: transformers computes the whole sequence anew for each token, and
plain rules, one after the other, make a token of its logits.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from family_models import NAMED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tiny_models import TIE_GAP, Reference, build

from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.servable import check_servable
from cluster.domain.clock import ManualClock
from cluster.domain.parallel_layout import Stage, StageLayers
from cluster.domain.request import SamplingParams, SequenceEnd, TokenLogprob
from cluster.engine import sampling
from cluster.engine.block_pool import BlockPool
from cluster.engine.loop import Cancel, CancelSession, Command, EngineLoop, Published, Submit
from cluster.engine.model.causal_lm import ShardedCausalLM
from cluster.engine.model.sampler import Sampler
from cluster.engine.model.tensor_parallel import TensorParallelGroup
from cluster.engine.prefill_pace import PrefillPace
from cluster.engine.progress import RankProgress
from cluster.engine.runner import LeaderRunner, RankShare
from cluster.engine.scheduler import Scheduler, SchedulerLimits
from cluster.engine.sequence import Sequence
from cluster.engine.step import SequenceKey
from cluster.engine.step_series import StepSeries
from cluster.telemetry.metrics import EngineMetrics

CPU = torch.device("cpu")
MAX_TOKENS = 24
MAX_MODEL_LEN = 58
PROMPT_LENGTHS = (1, 2, 3, 7, 12, 17, 23, 33)
UNSERVED = {SequenceEnd.REJECTED_CAPACITY, SequenceEnd.EVICTED_DEADLINE, SequenceEnd.ABORTED_DEADLINE}

# Each with every prompt; stops are those of the model below.
KNOBS: dict[str, dict[str, object]] = {
    "greedy": {},
    "greedy with penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 2},
    "seeded": {"temperature": 0.9, "seed": 11},
    "seeded with filters": {"temperature": 1.4, "top_k": 20, "top_p": 0.83, "seed": 2**64 - 1},
    "seeded with everything": {
        "temperature": 0.7, "top_p": 0.9, "min_p": 0.02, "seed": 5, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.2, "min_tokens": 5, "logit_bias": {7: 3.0, 9: -2.0}, "logprobs": 3,
    },
}  # fmt: skip
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: build("llama_gqa", folder),
    "mistral": lambda folder: build("mistral", folder),
    "phi3": NAMED["phi-3-128k"].build,  # its past is computed anew where it passes 24 tokens
}


@dataclass(frozen=True)
class Expected:
    """What one request gives when it runs alone and has MAX_TOKENS to give."""

    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: list[int]
    logprobs: list[float]  # of the tokens
    stops: bool  # a stop token came after ``tokens``

    def cut(self, max_tokens: int) -> tuple[list[int], SequenceEnd]:
        """The same with fewer tokens to give."""
        if len(self.tokens) < max_tokens and self.stops:
            return self.tokens, SequenceEnd.STOP
        return self.tokens[:max_tokens], SequenceEnd.LENGTH


class Plain:
    """transformers' logits of whole sequences, and sampling by the book."""

    def __init__(self, folder: Path) -> None:
        self.transformers = Reference(folder)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def expect(self, prompt: tuple[int, ...], params: SamplingParams) -> Expected:
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < params.max_tokens:
            logits = self.adjusted(prompt, tokens, params)
            token = int(self.scores(logits, len(prompt) + len(tokens), params).argmax())
            if token in params.stop_token_ids:  # those that come too early are masked
                return Expected(prompt, params, tokens, logprobs, stops=True)
            tokens.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
        return Expected(prompt, params, tokens, logprobs, stops=False)

    def adjusted(self, prompt: tuple[int, ...], generated: list[int], params: SamplingParams) -> torch.Tensor:
        """Logits after bias, penalties and the ban on stopping."""
        known = (*prompt, *generated)
        if known not in self._known:
            self._known[known] = self.transformers.logits(list(known))
        logits = self._known[known].clone()
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        for token in set(known) if params.repetition_penalty != 1.0 else ():
            up = logits[token] < 0
            logits[token] = (
                logits[token] * params.repetition_penalty if up else logits[token] / params.repetition_penalty
            )
        for token, count in Counter(generated).items():
            logits[token] -= params.presence_penalty + params.frequency_penalty * count
        if len(generated) < params.min_tokens:
            logits[list(params.stop_token_ids)] = -math.inf
        return logits

    @staticmethod
    def scores(logits: torch.Tensor, position: int, params: SamplingParams, slack: float = 0.0) -> torch.Tensor:
        """What the greatest of is the next token; ``slack`` widens the shares of probability that are kept."""
        if params.greedy:
            return logits.double()
        scores = logits.double() / params.temperature
        if params.top_k:
            scores[scores < scores.topk(params.top_k).values[-1] - slack] = -math.inf
        if params.top_p < 1.0:
            ordered, order = scores.sort(descending=True, stable=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            scores[order[before >= params.top_p + slack]] = -math.inf
        if params.min_p:
            shares = scores.softmax(-1)
            scores[shares < (params.min_p - slack) * shares.max()] = -math.inf
        key = sampling.noise_key(params.seed, position)
        noise = [sampling.gumbel(key, token) for token in range(scores.numel())]
        return scores + torch.tensor(noise, dtype=torch.float64)

    def compare(self, expected: Expected, max_tokens: int, got: list[int], end: SequenceEnd | None, what: str) -> bool:
        """Whether ``got`` is all that was expected, or with ``end`` None the beginning of it.

        A difference is forgiven, printed, and ends the comparison where the reference's choice hung by a hair.
        """
        tokens, expected_end = expected.cut(max_tokens)
        at = next((i for i, (a, b) in enumerate(zip(got, tokens, strict=False)) if a != b), min(len(got), len(tokens)))
        if at == len(got) and end in (None, expected_end) and (end is None or at == len(tokens)):
            return True
        params, prompt = expected.params, expected.prompt
        logits = self.adjusted(prompt, tokens[:at], params)
        narrow, wide = (self.scores(logits, len(prompt) + at, params, slack) for slack in (-TIE_GAP, TIE_GAP))
        chosen = [got[at]] if at < len(got) else sorted(params.stop_token_ids)
        gap = float(narrow.max() - wide[chosen].max())
        assert gap < TIE_GAP, f"{what}: token {at} of {got} ({end}) instead of {tokens} ({expected_end}), gap {gap}"
        print(f"tie at token {at} of {what}: gap {gap:.1e}")
        return False


class Subject:
    """One model in both forms, and what the reference says to every prompt with all KNOBS."""

    def __init__(self, name: str, folder: Path) -> None:
        MODELS[name](folder)
        checkpoint = read_checkpoint(folder)
        spec = check_servable(checkpoint)
        self.rope_by_length = spec.rope_by_length
        self.plain = Plain(folder)
        generator = torch.Generator().manual_seed(3)
        same = torch.randint(3, spec.vocab_size, (max(PROMPT_LENGTHS),), generator=generator).tolist()
        stops = frozenset(torch.randint(3, spec.vocab_size, (6,), generator=generator).tolist())
        # All begin alike, so that blocks are shared between them, until two of them part from the others.
        prompts = [tuple(same[:length]) for length in PROMPT_LENGTHS]
        prompts += [(*same[:16], *reversed(same[:9])), tuple(reversed(same[:12]))]
        self.expected = [
            self.plain.expect(prompt, SamplingParams(MAX_TOKENS, stop_token_ids=stops, **knobs))
            for prompt, knobs in itertools.product(prompts, KNOBS.values())
        ]
        stage = Stage(0, 1, StageLayers(0, spec.num_layers))
        self.model = ShardedCausalLM(checkpoint, torch.float32, CPU, TensorParallelGroup(0, 1, "gloo"), stage)
        self.model.load(lambda _: None, lambda _: None)


@pytest.fixture(scope="module", params=list(MODELS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Subject(request.param, tmp_path_factory.mktemp(request.param))
    torch.set_num_threads(threads)


# ---- the engine


@dataclass(frozen=True)
class Size:
    """An engine that is too small for all that comes: so it chunks, preempts, evicts and refuses."""

    block_size: int
    spare_tokens: int  # room in the cache beside one sequence of full length
    max_num_seqs: int
    token_budget: int
    prefill_tokens: int  # of long prompts, in a step with decodes
    short_prompt: int = 0
    depth: int = 1
    caching: bool = True
    max_preemptions: int = 4
    max_num_waiting: int = 64

    @property
    def num_blocks(self) -> int:
        return -(-(MAX_MODEL_LEN + self.spare_tokens) // self.block_size)


class Pace(PrefillPace):
    """One that does not look at how long anything took: tokens of long prompts in a step with decodes, and who is short."""

    def __init__(self, tokens: int, short_prompt: int) -> None:
        super().__init__(2.0, tokens)
        self._short_prompt = short_prompt

    def short_prompt(self, num_decodes: int) -> int:
        return self._short_prompt


@dataclass
class Client:
    """What the outside knows of one sequence."""

    expected: Expected
    max_tokens: int
    received: list[int]
    resumed: int
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ends: list[SequenceEnd] = field(default_factory=list)


class Engine:
    def __init__(self, subject: Subject, size: Size) -> None:
        self.subject, self.clock = subject, ManualClock()
        self.pool = BlockPool(size.num_blocks, size.block_size)
        limits = SchedulerLimits(
            size.max_num_seqs, size.token_budget, size.max_num_waiting, MAX_MODEL_LEN, size.max_preemptions,
            vocab_size=subject.model.vocab_size, rope_by_length=subject.rope_by_length,
        )  # fmt: skip
        self.scheduler = Scheduler(limits, self.pool, depth=size.depth, prefix_caching=size.caching)
        progress = RankProgress(self.clock)
        subject.model.make_cache(size.num_blocks, size.block_size, size.max_num_seqs, MAX_MODEL_LEN)
        sampler = Sampler(subject.model.vocab_size, size.max_num_seqs, CPU)
        runner = LeaderRunner(RankShare(subject.model, sampler), None, progress, size.depth)
        runner.warm_up(MAX_MODEL_LEN, size.num_blocks, size.block_size)
        series = StepSeries(EngineMetrics(CollectorRegistry()), self.scheduler, progress)
        pace = Pace(size.prefill_tokens, size.short_prompt)
        self.loop = EngineLoop(self.scheduler, runner, progress, series, self.hear, self.clock, pace)
        self.clients: dict[SequenceKey, Client] = {}
        self.commands: list[Command] = []

    def submit(
        self, expected: Expected, max_tokens: int = MAX_TOKENS, resume: int = 0, priority: int = 0,
        deadline: int | None = None, session: int = 1, salt: bytes = b"",
    ) -> SequenceKey:  # fmt: skip
        key = SequenceKey(session, len(self.clients))
        journal = expected.cut(max_tokens)[0][:resume]
        deadline_s = None if deadline is None else self.clock.now() + deadline
        params = replace(expected.params, max_tokens=max_tokens)
        sequence = Sequence(
            key, expected.prompt, params, list(journal), priority=priority, deadline_s=deadline_s, cache_salt=salt
        )
        self.clients[key] = Client(expected, max_tokens, list(journal), len(journal))
        self.commands.append(Submit(sequence))
        return key

    def arrive(self, submits: list[tuple]) -> None:
        for which, *how in submits:
            self.submit(self.subject.expected[which], *how)

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.turn()

    def cancel(self, choice: int) -> None:
        if self.clients:
            self.give_up([list(self.clients)[choice % len(self.clients)]])
            self.commands.append(Cancel(list(self.clients)[choice % len(self.clients)]))

    def lose_session(self, session: int) -> None:
        self.give_up([key for key in self.clients if key.session == session])
        self.commands.append(CancelSession(session))

    def give_up(self, keys: list[SequenceKey]) -> None:
        """News may be on their way, so these are over with the next turn."""
        for key in keys:
            if not self.clients[key].ends:
                self.clients[key].ends.append(SequenceEnd.CANCELLED)

    def turn(self) -> None:
        commands, self.commands = self.commands, []
        self.loop.turn(commands)
        self.clock.advance(1.0)
        self.scheduler.check()  # the pool's too

    def finish(self) -> None:
        """Every sequence to its end; the number of steps is bounded by the tokens there are to compute."""
        work = sum(2 * MAX_MODEL_LEN for client in self.clients.values() if not client.ends)
        preempted = self.scheduler.preemptions
        steps = 0
        while self.commands or not self.loop._idle:
            self.turn()
            steps += 1
            assert steps <= work + (self.scheduler.preemptions - preempted) * MAX_MODEL_LEN + 8, "it does not end"
        assert self.pool.num_free == self.pool.num_blocks
        for key, client in self.clients.items():
            self.judge(key, client)

    def hear(self, published: Published) -> None:
        for progress in published.progresses:
            client = self.clients[progress.key]
            if client.ends == [SequenceEnd.CANCELLED]:
                continue
            assert not client.ends, "news after the end"
            client.received += progress.token_ids
            client.logprobs += progress.logprobs
            if progress.end is not None:
                client.ends.append(progress.end)

    def judge(self, key: SequenceKey, client: Client) -> None:
        (end,) = client.ends
        expected, what = client.expected, f"{key} ({len(client.expected.prompt)} tokens, {client.expected.params})"
        if end in UNSERVED and end is not SequenceEnd.ABORTED_DEADLINE:
            assert len(client.received) == client.resumed == 0, what
        over = end in (SequenceEnd.STOP, SequenceEnd.LENGTH)
        assert over or end in UNSERVED or end is SequenceEnd.CANCELLED, f"{what}: {end}"
        same = self.subject.plain.compare(expected, client.max_tokens, client.received, end if over else None, what)
        fresh = client.received[client.resumed :]
        assert len(client.logprobs) == (len(fresh) if expected.params.logprobs else 0), what
        for place, told in enumerate(client.logprobs if same else ()):
            assert told.token_id == fresh[place], what
            assert len(told.top) == expected.params.logprobs, what
            assert told.logprob == pytest.approx(expected.logprobs[client.resumed + place], abs=1e-3), what


# ---- the tests

SIZES = st.builds(
    Size,
    block_size=st.sampled_from((1, 2, 3, 4, 7, 16)), spare_tokens=st.integers(0, 24), max_num_seqs=st.integers(1, 7) | st.integers(4, 7),
    token_budget=st.integers(1, 64), prefill_tokens=st.integers(1, 48), short_prompt=st.integers(0, 20), depth=st.integers(1, 3),
    caching=st.sampled_from((True, True, False)), max_preemptions=st.integers(0, 3),
    max_num_waiting=st.integers(3, 9),
)  # fmt: skip
SUBMITS = st.tuples(
    st.integers(0, len(KNOBS) * (len(PROMPT_LENGTHS) + 2) - 1),  # which prompt with which knobs
    st.integers(1, MAX_TOKENS) | st.just(MAX_TOKENS), st.integers(0, MAX_TOKENS) | st.just(0) | st.just(0),
    st.integers(-1, 1), st.none() | st.none() | st.none() | st.integers(1, 40), st.integers(1, 3),
    st.sampled_from((b"", b"", b"other")),
)  # fmt: skip
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.lists(SUBMITS, min_size=2, max_size=6)),
        st.tuples(st.just("arrive"), st.lists(SUBMITS, min_size=1, max_size=1)),
        st.tuples(st.just("turns"), st.integers(1, 15)),
        st.tuples(st.just("turns"), st.integers(1, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 1000)),
        st.tuples(st.just("lose_session"), st.integers(2, 3)),
    ),
    min_size=8, max_size=24,
)  # fmt: skip

happened: Counter[str] = Counter()


@given(size=SIZES, events=EVENTS)
@settings(
    max_examples=36, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_tokens_are_those_of_each_sequence_alone(subject: Subject, size: Size, events: list[tuple]) -> None:
    engine = Engine(subject, size)
    for name, value in events:
        getattr(engine, name)(value)
    engine.finish()
    happened["preemptions"] += engine.scheduler.preemptions
    happened["cached tokens"] += engine.scheduler.prefix_hits
    happened.update(end.value for client in engine.clients.values() for end in client.ends)


@pytest.mark.parametrize("knobs", list(KNOBS))
def test_a_request_continues_at_every_cut_as_if_it_had_never_stopped(subject: Subject, knobs: str) -> None:
    """All cuts in one batch, of a short prompt and of one that passes every boundary on its way."""
    engine = Engine(subject, Size(4, 48, 6, 24, 12))
    for length in (3, 17):
        expected = subject.expected[PROMPT_LENGTHS.index(length) * len(KNOBS) + list(KNOBS).index(knobs)]
        assert len(expected.prompt) == length
        for cut in range(len(expected.tokens) + 1):
            engine.submit(expected, resume=cut)
    engine.finish()
    ends = [client.ends for client in engine.clients.values()]
    assert all(end in ([SequenceEnd.STOP], [SequenceEnd.LENGTH]) for end in ends)


def test_the_reference_is_what_transformers_generates(subject: Subject) -> None:
    """Its own loop with its own cache."""
    generation = subject.plain.transformers.model.generation_config
    generation.eos_token_id = None
    for expected in subject.expected[:: len(KNOBS)]:
        assert expected.params.greedy
        prompt = torch.tensor([expected.prompt])
        out = subject.plain.transformers.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0
        )  # fmt: skip
        tokens = out[0].tolist()[len(expected.prompt) :]
        end_at = next((i for i, token in enumerate(tokens) if token in expected.params.stop_token_ids), MAX_TOKENS)
        whole = tokens[:end_at]
        end = SequenceEnd.STOP if len(whole) < MAX_TOKENS else SequenceEnd.LENGTH
        subject.plain.compare(expected, MAX_TOKENS, whole, end, f"generate of {len(expected.prompt)} tokens")


def test_lives_were_eventful() -> None:
    """What a property is said to survive must have happened."""
    if sum(happened.values()) == 0:
        pytest.skip("needs the lives")
    assert happened["preemptions"] > 20
    assert happened["cached tokens"] > 1000
    print(dict(happened))
    ends = ("stop", "length", "cancelled", "rejected_capacity", "evicted_deadline", "aborted_deadline")
    assert all(happened[end] >= 3 for end in ends), happened
