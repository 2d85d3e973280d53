"""The same with vLLM's asynchronous engine in this process, under vLLM's own interpreter: rows as JSON, last line."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator

from streams import Plan, measure


async def run(checkpoint: str, max_model_len: int, plan: Plan) -> list[dict]:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=checkpoint, dtype="float32", skip_tokenizer_init=True, max_model_len=max_model_len, max_num_seqs=64,
            gpu_memory_utilization=0.3,
        )
    )  # fmt: skip
    numbers = itertools.count()

    async def generate(prompt: list[int], tokens: int) -> AsyncIterator[object]:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        async for output in engine.generate({"prompt_token_ids": prompt}, params, str(next(numbers))):
            if output.outputs[0].token_ids:
                yield output

    try:
        return await measure(generate, plan)
    finally:
        engine.shutdown()


if __name__ == "__main__":  # vLLM starts processes that import this file again
    asked = json.loads(sys.argv[1])
    print(json.dumps(asyncio.run(run(asked["checkpoint"], asked["max_model_len"], Plan(**asked["plan"])))))
