"""Our scheduler, runner, model and sampler in this process: no Ray, no router, no gRPC; as vLLM is in its driver."""

from __future__ import annotations

import time
from pathlib import Path

from wire import Job, Request, Run, drive, versions

BLOCK_SIZE = 16


def start(config: dict) -> tuple[Run, dict[str, str]]:
    from cluster.domain.request import SamplingParams
    from cluster.engine.sequence import Sequence
    from cluster.engine.step import SequenceKey

    scheduler, runner = build(config)
    sent = 0

    def run(job: Job) -> list[Request]:
        nonlocal sent
        params = SamplingParams(max_tokens=job.new_tokens)
        waiting, requests, running = list(reversed(job.prompts)), [], {}
        while waiting or running:
            while waiting and len(running) < job.concurrency:
                sent += 1
                request = running[sent] = Request(time.monotonic())
                requests.append(request)
                scheduler.submit(Sequence(SequenceKey(1, sent), waiting.pop(), params), time.monotonic())
            plan = scheduler.schedule(time.monotonic()).plan
            assert plan is not None
            runner.dispatch(plan)
            for news in scheduler.commit(runner.collect()):
                running[news.key.sequence_id].take(news.token_ids)
                if news.end is not None:
                    del running[news.key.sequence_id]
        return requests

    return run, versions("llm-cluster", "torch", "transformers")


def build(config: dict) -> tuple:
    """What ``cluster.engine.rank`` does for a replica of one rank."""
    from cluster.engine import host_memory

    host_memory.prefer_huge_pages()
    import torch

    from cluster.checkpoint.config_json import model_spec
    from cluster.checkpoint.layout import read_checkpoint
    from cluster.config.schema import ModelConfig
    from cluster.domain.clock import MonotonicClock
    from cluster.domain.hardware import DeviceKind
    from cluster.domain.parallel_layout import Stage, StageLayers
    from cluster.engine.block_pool import BlockPool
    from cluster.engine.model.causal_lm import ShardedCausalLM
    from cluster.engine.model.sampler import Sampler
    from cluster.engine.model.tensor_parallel import TensorParallelGroup
    from cluster.engine.progress import RankProgress
    from cluster.engine.runner import LeaderRunner, RankShare
    from cluster.engine.scheduler import Scheduler, SchedulerLimits
    from cluster.planner.evaluate import step_tokens

    torch.set_num_threads(config["threads"])
    torch.set_grad_enabled(False)
    sequences, longest, device = config["max_num_seqs"], config["max_model_len"], torch.device("cpu")
    blocks = sequences * -(-longest // BLOCK_SIZE)
    checkpoint = read_checkpoint(Path(config["checkpoint"]))
    shape = model_spec(checkpoint.config, checkpoint.generation_config, tensors=checkpoint.tensors)
    stage = Stage(0, 1, StageLayers(0, shape.num_layers))
    model = ShardedCausalLM(
        checkpoint, getattr(torch, config["dtype"]), device, TensorParallelGroup(0, 1, "gloo"), stage
    )
    model.load(lambda _total: None, lambda _count: None)
    model.make_cache(blocks, BLOCK_SIZE, sequences, longest)
    runner = LeaderRunner(
        RankShare(model, Sampler(model.vocab_size, sequences, device), None, None), None, RankProgress(MonotonicClock())
    )
    runner.warm_up(longest, blocks, BLOCK_SIZE)
    budget = step_tokens(ModelConfig(model=config["checkpoint"]), DeviceKind.CPU)
    limits = SchedulerLimits(sequences, budget, sequences, longest, vocab_size=shape.vocab_size)
    return Scheduler(limits, BlockPool(blocks, BLOCK_SIZE)), runner


if __name__ == "__main__":
    drive(start)
