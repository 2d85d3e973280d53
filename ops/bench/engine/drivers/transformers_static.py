"""``generate`` of transformers, in batches of as many requests as there are clients."""

from __future__ import annotations

import time

from wire import Job, Request, Run, drive, versions


def start(config: dict) -> tuple[Run, dict[str, str]]:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(config["threads"])
    model = AutoModelForCausalLM.from_pretrained(config["checkpoint"], dtype=getattr(torch, config["dtype"])).eval()

    class Watch(StoppingCriteria):
        """Notes the time of each step; never stops anything."""

        def __init__(self, batch: list[Request]) -> None:
            self.batch = batch

        def __call__(self, input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
            for request, token in zip(self.batch, input_ids[:, -1].tolist(), strict=True):
                request.take([token])
            return torch.zeros(len(self.batch), dtype=torch.bool)

    def run(job: Job) -> list[Request]:
        requests = []
        for first in range(0, len(job.prompts), job.concurrency):
            prompts = torch.tensor(job.prompts[first : first + job.concurrency])
            batch = [Request(time.monotonic()) for _ in prompts]
            with torch.inference_mode():
                model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    do_sample=False,
                    max_new_tokens=job.new_tokens,
                    eos_token_id=None,
                    pad_token_id=0,
                    stopping_criteria=StoppingCriteriaList([Watch(batch)]),
                )
            requests += batch
        return requests

    return run, versions("transformers", "torch")


if __name__ == "__main__":
    drive(start)
