"""What a client receives."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.domain.request import TokenLogprob


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some new text and tokens. Text may lag behind the tokens: half a character is never shown.

    ``checkpoint_digest``: what they were computed with, for whoever keeps them to go on behind them later.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    checkpoint_digest: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """``generated_tokens`` covers all calls of the request, ``resumes`` counts those after the first.

    The others are what the last call's router said: ``failovers`` are the replicas that broke in that call alone.
    """

    prompt_tokens: int
    generated_tokens: int
    cached_prompt_tokens: int
    failovers: int
    resumes: int
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The last event of a stream, with the whole of it; ``finish_reason`` is "stop", "length" or "aborted"."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    usage: Usage
    request_id: str
