"""Runs step plans: this rank's share of each, on the leader with the results of all, on the others in step with it."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cluster.domain.errors import CheckpointError
from cluster.domain.request import SamplingParams, TokenLogprob
from cluster.engine.plan_channel import PlanReceiver, PlanSender, Token, decode_plan
from cluster.engine.progress import RankProgress
from cluster.engine.stage_link import StageReceiver, StageSender
from cluster.engine.step import SampledToken, SequenceKey, SequenceStart, StepEntry, StepPlan, StepResult

_WARM_UP_TOKENS = 8


class StageModel(Protocol):
    """A rank's part of the model: ``ShardedCausalLM`` of its stage."""

    def forward(self, plan: StepPlan, hidden: torch.Tensor | None = None) -> torch.Tensor | None:
        """``hidden`` ``[tokens, hidden_size]`` of the stage before (the first stage: None) -> the same for the next.

        Of the last stage the first rank returns ``[sampled, vocabulary]`` logits, the others None.
        """
        ...


class Drawn(Protocol):
    """A token, and its log-probabilities when they were asked for."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> TokenLogprob | None: ...


class TokenSampler(Protocol):
    """``Sampler``: keeps the history of each slot and appends what it draws."""

    def start(self, start: SequenceStart) -> None: ...
    def sample(self, logits: torch.Tensor, slots: Sequence[int]) -> Sequence[Drawn]: ...


class RankShare:
    """What one rank does of every plan: takes hidden states in, computes, hands them on or samples.

    ``sampler``: on the first rank of the last stage. Until ``ready`` it looks whether the logits are finite.
    """

    def __init__(
        self, model: StageModel, sampler: TokenSampler | None,
        incoming: StageReceiver | None = None, outgoing: StageSender | None = None,
    ) -> None:  # fmt: skip
        self._model, self._sampler = model, sampler
        self._incoming, self._outgoing = incoming, outgoing
        self._ready = False

    @property
    def samples(self) -> bool:
        return self._sampler is not None

    def ready(self) -> None:
        """The warm-up is over, and what is there now stays for the life of the process.

        So the garbage collector is told not to look at it again: over torch and a model a full collection takes 0.2 s,
        in which no step is run.
        """
        self._ready = True
        gc.freeze()

    def take(self, plan: StepPlan) -> torch.Tensor | None:
        """Waits for the hidden states of the stage before; None in the first stage."""
        return None if self._incoming is None else self._incoming.receive(plan.step, plan.num_tokens)

    @torch.inference_mode()
    def run(self, plan: StepPlan, hidden: torch.Tensor | None) -> list[Token]:
        """The tokens in plan order where this rank samples, else nothing. Plans come in order."""
        out = self._model.forward(plan, hidden)
        if self._outgoing is not None:
            assert out is not None, "a stage before the last returns hidden states"
            self._outgoing.send(plan.step, out)
            return []
        if self._sampler is None:
            return []
        for start in plan.starts:
            self._sampler.start(start)
        slots = [entry.slot for entry in plan.entries if entry.sample]
        if not slots:
            return []
        assert out is not None, "the sampling rank gets logits"
        if not self._ready and not bool(torch.isfinite(out).all()):
            raise CheckpointError("The model's logits are not finite; its weights are damaged: copy them again.")
        return [(drawn.token_id, drawn.logprob) for drawn in self._sampler.sample(out, slots)]


class LeaderRunner:
    """The StepRunner of rank 0: tells the others, computes its share, gathers what was sampled.

    ``dispatch`` only sends: the leader's own share is computed in ``collect``, oldest plan first, so that whoever
    dispatched can publish while the other ranks have begun.
    """

    def __init__(
        self, share: RankShare, plans: PlanSender | None, progress: RankProgress, depth: int = 1
    ) -> None:  # fmt: skip
        assert depth >= 1, depth
        assert share.samples or plans is not None, "somebody else samples, and there is no way to hear of it"
        self._share, self._plans, self._progress, self._depth = share, plans, progress, depth
        self._uncomputed: deque[StepPlan] = deque()
        self._outstanding: deque[tuple[int, list[SequenceKey]]] = deque()  # steps, and whose tokens they bring

    @property
    def depth(self) -> int:
        return self._depth

    def dispatch(self, plan: StepPlan) -> None:
        if self._plans is not None:
            self._plans.send(plan)
        self._uncomputed.append(plan)
        self._outstanding.append((plan.step, [entry.key for entry in plan.entries if entry.sample]))

    def collect(self) -> StepResult:
        step, keys = self._outstanding.popleft()
        tokens: list[Token] = []
        while self._uncomputed:
            plan = self._uncomputed.popleft()
            tokens = self._share.run(plan, self._share.take(plan))
            if self._share.samples:
                break  # one stage: plans further on wait for their own turn
        if not self._share.samples:  # an answer comes even when it is empty: so nobody runs ahead of the last stage
            assert self._plans is not None
            self._progress.waits_for_peer = True
            tokens = self._plans.receive_tokens(step)
            self._progress.waits_for_peer = False
        sampled = [SampledToken(key, token, logprob) for key, (token, logprob) in zip(keys, tokens, strict=True)]
        return StepResult(step, tuple(sampled))

    def warm_up(self, max_model_len: int, num_blocks: int, block_size: int) -> None:
        """A prefill and a decode on all ranks, into blocks that nobody owns yet; then everybody is READY.

        CheckpointError when the logits are not finite: then the weights are damaged.
        """
        for plan in warm_up_plans(max_model_len, num_blocks, block_size):
            self.dispatch(plan)
            self.collect()
        self._share.ready()
        if self._plans is not None:
            self._plans.send_ready()


def warm_up_plans(max_model_len: int, num_blocks: int, block_size: int) -> tuple[StepPlan, StepPlan]:
    """A short prompt in slot 0, and the token after it; what they leave behind is overwritten by the first sequence."""
    count = max(1, min(_WARM_UP_TOKENS, max_model_len - 1, num_blocks * block_size - 1))
    key, held = SequenceKey(0, 0), -(-count // block_size)
    needed = (count + block_size) // block_size
    params = SamplingParams(max_tokens=2, temperature=1.0)
    prompt = (0,) * count
    prefill = StepEntry(key, 0, prompt, 0, 0, tuple(range(held)), sample=True, num_prompt=count)
    decode = StepEntry(key, 0, (0,), count, held, tuple(range(held, needed)), sample=True, num_prompt=count)
    return StepPlan(1, (prefill,), (SequenceStart(0, params, prompt, ()),)), StepPlan(2, (decode,))


def follow(share: RankShare, plans: PlanReceiver, progress: RankProgress, on_ready: Callable[[], None]) -> None:
    """A rank's life after loading: runs what it is told until EngineFailed says that somebody is gone.

    A step begins when the rank can: what it waits for before that is its peers' time.
    """
    while True:
        message = plans.receive()
        if message.ready:
            progress.step = 0  # the warm-up does not count, here as on the leader
            share.ready()
            on_ready()
            continue
        plan = decode_plan(message)
        hidden = share.take(plan)
        progress.begin_step()
        cpu_started = time.thread_time()
        tokens = share.run(plan, hidden)
        if share.samples:
            plans.answer(plan.step, tokens)
        progress.end_step(plan.step, time.thread_time() - cpu_started)
