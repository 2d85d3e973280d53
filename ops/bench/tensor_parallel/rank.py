"""One rank of the measurement, as ``cluster.engine.rank`` makes it, without Ray, gRPC and heartbeat but with timers.

Reads a line of JSON (its place, the model, ports), then orders, one in a line; answers each with a line.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from timers import Timers

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.dummy import dummy_checkpoint
from cluster.domain.clock import MonotonicClock
from cluster.domain.hardware import DeviceKind
from cluster.domain.ids import Incarnation, RankId, ReplicaId
from cluster.domain.model_spec import Dtype
from cluster.domain.parallel_layout import ParallelLayout
from cluster.domain.request import SamplingParams
from cluster.engine import host_memory
from cluster.engine.block_pool import BlockPool
from cluster.engine.progress import RankProgress
from cluster.engine.rank_spec import RankSpec
from cluster.engine.scheduler import Scheduler, SchedulerLimits
from cluster.engine.sequence import Sequence
from cluster.engine.step import SequenceKey

SEED, BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_TOKENS = 20, 16, 768, 32, 2048
KV_BLOCKS = MAX_NUM_SEQS * 14 + 64
DEADLINE_S = 120.0
REDUCE_ROWS, REDUCE_CALLS = (1, 8, 32, 512), 300


def spec_of(given: dict[str, Any]) -> RankSpec:
    incarnation = Incarnation(ReplicaId("bench", 0), 1)
    return RankSpec(
        cluster_name="bench", rank_id=RankId(incarnation, given["rank"]), layout=ParallelLayout(given["tp"], 1),
        stages=(), model_name="bench", checkpoint_path=given["folder"], revision=None, checkpoint_digest="",
        served_digest="", dtype=Dtype.FLOAT32, device=DeviceKind.CPU, collective=given["collective"],
        master_host="127.0.0.1", master_port=given["master_port"], plan_host="127.0.0.1", plan_port=given["plan_port"],
        max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_TOKENS, max_num_waiting=64,
        block_size=BLOCK_SIZE, kv_blocks=KV_BLOCKS, control_address="", bind_host="127.0.0.1", engine_port=0,
        metrics_port=0, node_id="", host="127.0.0.1", log_file="", threads=given["threads"], weight_bytes=0,
        load_format="dummy", seed=SEED,
    )  # fmt: skip


class Rank:
    """Joined, loaded, with its share of the model wrapped in timers."""

    def __init__(self, spec: RankSpec) -> None:
        host_memory.prefer_huge_pages()  # torch is not imported yet
        import torch

        from cluster.engine.model.causal_lm import ShardedCausalLM
        from cluster.engine.model.sampler import Sampler
        from cluster.engine.model.tensor_parallel import TensorParallelGroup
        from cluster.engine.rank_channels import RankChannels
        from cluster.engine.runner import RankShare

        self.spec, self.timers, self.progress = spec, Timers(), RankProgress(MonotonicClock())
        torch.set_num_threads(spec.threads)
        torch.set_grad_enabled(False)
        checkpoint = dummy_checkpoint(Path(spec.checkpoint_path), SEED)
        self.shape = model_spec(checkpoint.config, checkpoint.generation_config, tensors=checkpoint.tensors)
        group = TensorParallelGroup(spec.tensor_rank, spec.layout.tensor_parallel_size, spec.collective)
        group.join(spec.master_host, spec.master_port, DEADLINE_S)
        self._wrap_operations()
        cpu = torch.device("cpu")
        model = ShardedCausalLM(checkpoint, torch.float32, cpu, group, spec.stage(self.shape.num_layers))
        self.channels = RankChannels(spec, model.hidden_size, lose)
        self.channels.open(DEADLINE_S, MonotonicClock())
        model.load(lambda _total: None, lambda _count: None)
        model.make_cache(KV_BLOCKS, BLOCK_SIZE, MAX_NUM_SEQS, MAX_MODEL_LEN)
        sampler = Sampler(model.vocab_size, MAX_NUM_SEQS, cpu) if spec.is_leader else None
        self.share = RankShare(model, sampler)
        self.reduce = self._time_reduce(model.hidden_size) if group.size > 1 else {}
        self.share.run = self.timers.wrap("share", self.share.run)  # type: ignore[method-assign]

    def _wrap_operations(self) -> None:
        """Before the model looks them up: the names under which the engine calls what is long."""
        import torch

        from cluster.engine.model import kernels

        wrap, mkldnn = self.timers.wrap, torch.ops.mkldnn
        mkldnn._linear_pointwise = self._wrap_operator("product", mkldnn._linear_pointwise)  # noqa: SLF001
        library = kernels.load()
        for name, value in list(vars(library).items()) if library is not None else ():
            kind = next((part for part in ("attention", "product") if part in name), "small_kernels")
            if isinstance(value, dict):  # by element type
                value.update({key: wrap(kind, function) for key, function in value.items()})
            elif callable(value):
                setattr(library, name, wrap(kind, value))
        if self.spec.layout.tensor_parallel_size > 1:
            comm = sys.modules["deepspeed.comm"]
            comm.inference_all_reduce = wrap("reduce", comm.inference_all_reduce)
            if self.spec.collective == "shm":
                own = torch.ops.deepspeed
                own.inference_all_reduce_ = self._wrap_operator("reduce_kernel", own.inference_all_reduce_)
            else:
                torch.distributed.all_reduce = wrap("reduce_kernel", torch.distributed.all_reduce)

    def _wrap_operator(self, kind: str, operator: Any) -> Any:
        """An operator of torch with its overloads."""
        timed = self.timers.wrap(kind, operator)
        for name in operator.overloads():
            setattr(timed, name, self.timers.wrap(kind, getattr(operator, name)))
        return timed

    def _time_reduce(self, hidden_size: int) -> dict[str, dict[str, float]]:
        """Microseconds of an all-reduce of that many rows, both ranks in step: DeepSpeed's function, its operator."""
        import torch

        comm = sys.modules["deepspeed.comm"]
        ways = {"function": comm.inference_all_reduce}
        if self.spec.collective == "shm":
            ways["operator"] = torch.ops.deepspeed.inference_all_reduce_
        found: dict[str, dict[str, float]] = {}
        for rows in REDUCE_ROWS:
            tensor, times = torch.zeros(1, rows, hidden_size), {name: [] for name in ways}
            for _ in range(REDUCE_CALLS):
                for name, call in ways.items():
                    started = time.perf_counter()
                    call(tensor)
                    times[name].append(1e6 * (time.perf_counter() - started))
            found[str(rows)] = {
                f"{name}_{kind}_us": round(figure(values), 1)
                for name, values in times.items()
                for kind, figure in (("least", min), ("median", statistics.median))
            }
        return found

    def lead(self) -> None:
        """Warms up, then runs what it is told."""
        from cluster.engine.runner import LeaderRunner

        spec, sender = self.spec, self.channels.sender
        if sender is not None:
            sender.await_loaded(DEADLINE_S)
        self._runner = LeaderRunner(self.share, sender, self.progress)
        self._runner.warm_up(MAX_MODEL_LEN, KV_BLOCKS, BLOCK_SIZE)
        limits = SchedulerLimits(MAX_NUM_SEQS, MAX_TOKENS, 64, MAX_MODEL_LEN, vocab_size=self.shape.vocab_size)
        self._scheduler = Scheduler(limits, BlockPool(KV_BLOCKS, spec.block_size), prefix_caching=False)
        self._sent = 0
        answer({"ready": {"reduce_us": self.reduce}})
        for order in orders():
            self.timers.on = order["timed"]
            steps = self._decode(order) if order["kind"] == "decode" else self._prefill(order)
            self.timers.on = False
            answer({"steps": steps, "events": self.timers.take()})

    def _submit(self, prompt_tokens: int, new_tokens: int) -> None:
        self._sent += 1
        draw = random.Random(self._sent)
        prompt = [draw.randrange(3, self.shape.vocab_size) for _ in range(prompt_tokens)]
        params = SamplingParams(max_tokens=new_tokens)
        refused = self._scheduler.submit(Sequence(SequenceKey(1, self._sent), prompt, params), 0.0)
        assert refused is None, refused

    def _step(self) -> tuple[float, float]:
        """From the plan's dispatch to its tokens."""
        plan = self._scheduler.schedule(0.0).plan
        assert plan is not None
        started = time.monotonic()
        self._runner.dispatch(plan)
        result = self._runner.collect()
        ended = time.monotonic()
        self._scheduler.commit(result)
        return started, ended

    def _decode(self, order: dict[str, Any]) -> list[tuple[float, float]]:
        count, steps = order["sequences"], order["steps"]
        for _ in range(count):
            self._submit(order["prompt_tokens"], steps + 2)
        self._step()  # the prompts
        self._step()
        self.timers.take()
        found = [self._step() for _ in range(steps)]
        assert not self._scheduler.has_work
        return found

    def _prefill(self, order: dict[str, Any]) -> list[tuple[float, float]]:
        found = []
        for _ in range(order["steps"]):
            self._submit(order["prompt_tokens"], 1)
            found.append(self._step())
        return found

    def follow(self) -> None:
        """Computes what the leader says; a thread beside it answers orders while no step runs."""
        from cluster.engine.runner import follow

        receiver = self.channels.receiver
        assert receiver is not None
        receiver.tell_loaded()
        ready = threading.Event()
        threading.Thread(target=self._serve_timers, args=(ready,), daemon=True).start()
        follow(self.share, receiver, self.progress, ready.set)

    def _serve_timers(self, ready: threading.Event) -> None:
        assert ready.wait(DEADLINE_S)
        answer({"ready": {"reduce_us": self.reduce}})
        for order in orders():
            self.timers.on = order["timed"]
            answer({"events": self.timers.take()})
        os._exit(0)


def orders() -> Any:
    return map(json.loads, sys.stdin)


def answer(message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")


def lose(who: str) -> None:
    print(who, file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    given = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, given["cpus"])
    rank = Rank(spec_of(given))
    if rank.spec.is_leader:
        rank.lead()
    else:
        rank.follow()
    os._exit(0)


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print does not belong among the answers
    main()
