"""Continuous batching of transformers: its manager with a paged cache, requests streamed."""

from __future__ import annotations

import time

from wire import Job, Request, Run, drive, versions

MAX_BATCH_TOKENS = 2048

managers: list = []


def start(config: dict) -> tuple[Run, dict[str, str]]:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    torch.set_num_threads(config["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        config["checkpoint"], dtype=getattr(torch, config["dtype"]), attn_implementation="sdpa"
    ).eval()
    page = 32
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=page,
            num_blocks=config["max_num_seqs"] * (config["max_model_len"] // page + 1),
            max_batch_tokens=MAX_BATCH_TOKENS,
        ),
    )
    manager.start()
    managers.append(manager)
    sent = 0

    def run(job: Job) -> list[Request]:
        nonlocal sent
        waiting, requests, running = list(reversed(job.prompts)), [], {}
        while waiting or running:
            while waiting and len(running) < job.concurrency:
                sent += 1
                request = running[str(sent)] = Request(time.monotonic())
                requests.append(request)
                manager.add_request(
                    waiting.pop(), str(sent), max_new_tokens=job.new_tokens, streaming=True, eos_token_id=-1
                )
            output = manager.get_result(timeout=60)
            if output is None or output.error:
                raise RuntimeError(f"continuous batching gave up: {output and output.error}")
            request = running[output.request_id]
            request.take(output.generated_tokens[len(request.token_ids) :])
            if output.is_finished():
                del running[output.request_id]
        return requests

    return run, versions("transformers", "torch")


if __name__ == "__main__":
    drive(start, lambda: [manager.stop(block=True, timeout=10) for manager in managers])
