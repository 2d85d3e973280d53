"""The streams, the long prompt and the gaps between tokens; whoever serves them.

Needs nothing but the standard library, so that another engine's own interpreter can run it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

STREAM_PROMPT_TOKENS, STREAM_TOKENS, FIRST_TOKENS = 64, 5000, 20
STREAMS_DEADLINE_S = 60.0  # until all of them stream

# (prompt, new tokens) -> one item for each message that brought tokens
Generate = Callable[[list[int], int], AsyncIterator[object]]


@dataclass(frozen=True)
class Plan:
    """What is measured. ``prompt_deadline_s``: a long prompt without a token by then is given up, and said to be."""

    streams: int
    prompt_tokens: int
    vocab_size: int
    window_s: float
    repetitions: int
    prompt_deadline_s: float

    @property
    def longest_s(self) -> float:
        """The measurement ends within this, whatever the engine does."""
        each = STREAMS_DEADLINE_S + 2 * self.window_s + self.prompt_deadline_s + 10
        return self.repetitions * each + self.prompt_deadline_s


def prompt_of(tokens: int, vocab_size: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, vocab_size) for _ in range(tokens)]


class Streams:
    """Streams that run until they are stopped, and the gaps between their tokens."""

    def __init__(self, generate: Generate, plan: Plan, seed: int) -> None:
        self.gaps: list[float] = []
        self._generate, self._stopped = generate, False
        self._tokens = [0] * plan.streams
        prompts = [prompt_of(STREAM_PROMPT_TOKENS, plan.vocab_size, seed + i) for i in range(plan.streams)]
        self._tasks = [asyncio.create_task(self._run(i, prompt)) for i, prompt in enumerate(prompts)]

    async def _run(self, index: int, prompt: list[int]) -> None:
        last = None
        async with contextlib.aclosing(self._generate(prompt, STREAM_TOKENS)) as messages:
            async for _ in messages:
                if self._stopped:
                    return
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append(now - last)
                last = now
                self._tokens[index] += 1

    async def started(self) -> None:
        """Until each of them has brought some tokens; TimeoutError."""
        async with asyncio.timeout(STREAMS_DEADLINE_S):
            while min(self._tokens) < FIRST_TOKENS:
                self._look()
                await asyncio.sleep(0.05)

    async def watched(self, seconds: float) -> dict[str, float]:
        self.gaps.clear()
        await asyncio.sleep(seconds)
        return self.percentiles()

    def percentiles(self) -> dict[str, float]:
        """By nearest rank: of fewer than 100 gaps the p99 is the longest."""
        self._look()
        if not self.gaps:
            raise RuntimeError("the streams brought no token")
        ordered = sorted(self.gaps)
        p50, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.99))
        return {"p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99, "most_ms": 1e3 * ordered[-1], "gaps": len(ordered)}

    def _look(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()
                raise RuntimeError("a stream has ended; the measurement takes longer than its tokens last")

    async def stop(self) -> None:
        self._stopped = True  # a client may swallow a cancellation, and a stream that brings nothing does not look
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=10)


async def first_token_s(generate: Generate, prompt: list[int], deadline_s: float) -> float | None:
    """From sending the prompt to its first token; None when none came in time."""
    started = time.perf_counter()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(deadline_s), contextlib.aclosing(generate(prompt, 2)) as messages:
            async for _ in messages:
                return time.perf_counter() - started
    return None


async def measure(generate: Generate, plan: Plan) -> list[dict]:
    """One row for each repetition; the first long prompt of all, alone, is not counted but warms everything up."""
    rows = []
    alone_s = await first_token_s(generate, prompt_of(plan.prompt_tokens, plan.vocab_size, 7), plan.prompt_deadline_s)
    for repetition in range(plan.repetitions):
        streams = Streams(generate, plan, 1000 * (repetition + 1))
        try:
            await streams.started()
            before = await streams.watched(plan.window_s)
            streams.gaps.clear()
            prompt = prompt_of(plan.prompt_tokens, plan.vocab_size, 77 + repetition)
            ttft_s = await first_token_s(generate, prompt, plan.prompt_deadline_s)
            beside = streams.percentiles()
            after = await streams.watched(plan.window_s)
        finally:
            await streams.stop()
        alone_p99_ms = (before["p99_ms"] + after["p99_ms"]) / 2
        rows.append(
            {
                "alone_before": before, "beside": beside, "alone_after": after,
                "p99_ratio": beside["p99_ms"] / alone_p99_ms,
                "p99_ratio_to_before": beside["p99_ms"] / before["p99_ms"],
                "ttft_s": ttft_s, "ttft_without_streams_s": alone_s,
            }
        )  # fmt: skip
    return rows
