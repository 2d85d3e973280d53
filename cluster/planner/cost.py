"""Expected speed by the roofline: what memory bandwidth, arithmetic and the links allow at best.

T_step >= max((weight_bytes + B S kv_bytes) / BW, 2 P B / F) + 2 L T_allreduce, each term per rank (shards of
a tensor-parallel group are read at the same time; pipeline stages of one token follow each other).
Source: Williams et al., "Roofline", CACM 2009; the all-reduce is a ring's, 2 (n - 1) / n x bytes / link, plus a
start-up time. Real steps are slower; the estimate orders layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.domain.hardware import DeviceKind, DeviceType
from cluster.domain.model_spec import Dtype, ModelSpec
from cluster.domain.parallel_layout import ParallelLayout
from cluster.planner.memory import RankLedger

PROMPT_TOKENS = 1024
# Start-up of one collective inside a node: NCCL over NVLink; shared memory between processes on a CPU.
_COLLECTIVE_START_S = {DeviceKind.CUDA: 10e-6, DeviceKind.CPU: 20e-6}
_HOP_START_S = 30e-6  # one message to the next pipeline stage


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Lower bounds for one sequence alone: ``ttft_s`` for a prompt of ``prompt_tokens``, ``tpot_s`` after it."""

    ttft_s: float
    tpot_s: float
    prompt_tokens: int


def estimate(
    spec: ModelSpec,
    layout: ParallelLayout,
    ledgers: Sequence[RankLedger],
    dtype: Dtype,
    device: DeviceType,
    inter_node_bytes_per_s: float,
    max_model_len: int,
) -> CostEstimate:
    """The roofline of ``layout`` for one sequence."""
    prompt = min(PROMPT_TOKENS, max_model_len)
    times = [
        sum(
            _stage_time(spec, layout, ledgers, dtype, device, stage=stage, tokens=tokens, context=prompt)
            for stage in range(layout.pipeline_parallel_size)
        )
        + (layout.pipeline_parallel_size - 1)
        * (_HOP_START_S + tokens * spec.hidden_size * dtype.itemsize / inter_node_bytes_per_s)
        for tokens in (prompt, 1)
    ]
    return CostEstimate(times[0], times[1], prompt)


def _stage_time(
    spec: ModelSpec,
    layout: ParallelLayout,
    ledgers: Sequence[RankLedger],
    dtype: Dtype,
    device: DeviceType,
    *,
    stage: int,
    tokens: int,
    context: int,
) -> float:
    ranks = [ledger for ledger in ledgers if ledger.stage == stage]
    # The embedding is looked up, not multiplied with, unless it is the head too.
    looked_up = spec.vocab_size * spec.hidden_size if stage == 0 else 0
    if spec.tie_word_embeddings and layout.pipeline_parallel_size == 1:
        looked_up = 0
    parameters = max(ledger.parameters for ledger in ranks) - looked_up
    kv_bytes = max(ledger.kv_bytes_per_token for ledger in ranks) * context
    memory_s = (parameters * dtype.itemsize + kv_bytes) / device.memory_bytes_per_s
    arithmetic_s = 2 * parameters * tokens / device.flops
    message = tokens * spec.hidden_size * dtype.itemsize
    return max(memory_s, arithmetic_s) + 2 * len(ranks[0].layers) * _all_reduce_s(layout, device, message)


def _all_reduce_s(layout: ParallelLayout, device: DeviceType, message_bytes: int) -> float:
    tp = layout.tensor_parallel_size
    if tp == 1:
        return 0.0
    return _COLLECTIVE_START_S[device.kind] + 2 * (tp - 1) / tp * message_bytes / device.link_bytes_per_s
