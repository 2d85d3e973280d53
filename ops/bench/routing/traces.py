"""Made-up traffic for the routing simulation: conversations with the tokens of each turn. Seeded, pure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.domain.block_hash import LeadingNames
from cluster.router.policy.prompt_blocks import PromptBlocks

BLOCK_SIZE = 16
_VOCABULARY = 100_000


@dataclass(frozen=True)
class Turn:
    """One request; ``pause_s`` passes between the end of the turn before and this one."""

    prompt: tuple[int, ...]
    answer_tokens: int
    pause_s: float
    blocks: PromptBlocks = field(compare=False)
    after: LeadingNames = field(compare=False)  # the names of prompt and answer together


@dataclass(frozen=True)
class Conversation:
    """Turns one after the other; the first comes at ``start_s``."""

    name: str
    start_s: float
    turns: tuple[Turn, ...]


Trace = tuple[Conversation, ...]


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(_VOCABULARY) for _ in range(count))


def _between(rng: random.Random, low: int, high: int) -> int:
    """Log-uniform: as many from 50 to 100 as from 100 to 200."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _turn(prompt: tuple[int, ...], answer: tuple[int, ...], pause_s: float) -> Turn:
    return Turn(prompt, len(answer), pause_s, PromptBlocks(prompt), LeadingNames(prompt + answer, BLOCK_SIZE))


def multi_turn_chat(seed: int, conversations: int = 240, per_s: float = 2.4) -> Trace:
    """People who talk: 1 to 10 turns with everything said before, a short system prompt that is the same for all."""
    rng = random.Random(f"chat {seed}")
    system, start_s, trace = _tokens(rng, 200), 0.0, []
    for index in range(conversations):
        start_s += rng.expovariate(per_s)
        said, turns = system, []
        for _ in range(rng.randint(1, 10)):
            prompt = said + _tokens(rng, _between(rng, 40, 800))
            answer = _tokens(rng, _between(rng, 40, 400))
            turns.append(_turn(prompt, answer, rng.uniform(2.0, 12.0)))
            said = prompt + answer
        trace.append(Conversation(f"chat-{index}", start_s, tuple(turns)))
    return tuple(trace)


def shared_prompts(seed: int, requests: int = 1200, per_s: float = 14.0, prompts: int = 64) -> Trace:
    """Applications with long system prompts, some much more popular than others (Zipf), and short questions."""
    rng = random.Random(f"shared {seed}")
    systems = [_tokens(rng, _between(rng, 800, 6000)) for _ in range(prompts)]
    weights = [1.0 / (1 + rank) for rank in range(prompts)]
    start_s, trace = 0.0, []
    for index in range(requests):
        start_s += rng.expovariate(per_s)
        prompt = rng.choices(systems, weights)[0] + _tokens(rng, _between(rng, 20, 400))
        turn = _turn(prompt, _tokens(rng, _between(rng, 20, 300)), 0.0)
        trace.append(Conversation(f"shared-{index}", start_s, (turn,)))
    return tuple(trace)


def uncorrelated(seed: int, requests: int = 1200, per_s: float = 24.0) -> Trace:
    """Prompts that have nothing in common."""
    rng = random.Random(f"uncorrelated {seed}")
    start_s, trace = 0.0, []
    for index in range(requests):
        start_s += rng.expovariate(per_s)
        turn = _turn(_tokens(rng, _between(rng, 100, 6000)), _tokens(rng, _between(rng, 20, 300)), 0.0)
        trace.append(Conversation(f"alone-{index}", start_s, (turn,)))
    return tuple(trace)


TRACES: dict[str, Callable[[int], Trace]] = {
    "multi_turn_chat": multi_turn_chat,
    "shared_prompts": shared_prompts,
    "uncorrelated": uncorrelated,
}
