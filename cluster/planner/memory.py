"""The byte ledger of every rank: weights, activations, reserve, and what is left for the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.checkpoint.splits import head_shares, shard_sizes
from cluster.checkpoint.tensors import model_cuts
from cluster.domain.hardware import DeviceKind, DeviceType
from cluster.domain.model_spec import Dtype, ModelSpec
from cluster.domain.parallel_layout import ATTENTION_WORKSPACE_BYTES, ParallelLayout, StageLayers
from cluster.domain.quantities import GIB
from cluster.planner.weights import largest_slices, stage_parameters

# What a process needs beside tensors: CUDA context, NCCL buffers and allocator slack; or the interpreter with
# torch, Ray and gRPC loaded on a CPU. Round figures, not measured ones.
RESERVE_BYTES = {DeviceKind.CUDA: 2 * GIB, DeviceKind.CPU: GIB // 2}
# Buffers that weights are read into, and smaller weights that are joined and reordered together.
LOADING_SPARE_BYTES = 100 * 10**6
# A CPU's memory is shared with everything else on the machine: the cache stays modest unless told otherwise.
CPU_KV_CAP_BYTES = 1 * GIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step and a sequence; ``kv_cache_bytes`` None = what the device leaves."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    device_memory_utilization: float
    kv_cache_bytes: int | None = None

    @property
    def blocks_per_sequence(self) -> int:
        """KV blocks of one sequence of full length."""
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class RankLedger:
    """One rank's bytes. ``budget_bytes``: the device's memory times its utilization.

    ``rotary_bytes``: the computed inverse frequencies, kept twice in float32. ``kv_bytes``: given to the cache.
    ``read_bytes``: from storage, where the checkpoint's headers are known, else 0. ``loading_bytes``: what loading
    takes above the weights for a while, before there are activations or a KV cache.
    """

    rank: int
    stage: int
    layers: StageLayers
    parameters: int
    weight_bytes: int
    rotary_bytes: int
    activation_bytes: int
    reserve_bytes: int
    budget_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int = 0
    read_bytes: int = 0
    loading_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """Everything but the KV cache."""
        return self.weight_bytes + self.rotary_bytes + self.activation_bytes + self.reserve_bytes

    @property
    def start_bytes(self) -> int:
        """The most that is taken before the KV cache is there: by loading, or by the first steps."""
        return self.fixed_bytes + max(0, self.loading_bytes - self.activation_bytes)

    @property
    def room_bytes(self) -> int:
        """What the budget leaves for the KV cache; negative when the rest does not fit."""
        room = self.budget_bytes - self.fixed_bytes
        start = self.budget_bytes - self.start_bytes
        return room if start >= 0 else start

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.kv_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is taken at any time: while it serves, or while it starts."""
        return max(self.total_bytes, self.start_bytes)


def rank_ledgers(
    spec: ModelSpec,
    layout: ParallelLayout,
    stages: tuple[StageLayers, ...],
    dtype: Dtype,
    device: DeviceType,
    limits: Limits,
) -> tuple[RankLedger, ...]:
    """The ledger of every rank, KV cache not yet given out."""
    ledgers = []
    budget = int(device.memory_bytes * limits.device_memory_utilization)
    for stage, layers in enumerate(stages):
        parameters = stage_parameters(spec, layout, stage, layers)
        slices = largest_slices(spec, layout, stage, layers)
        for index, count in enumerate(parameters):
            ledgers.append(
                RankLedger(
                    rank=stage * layout.tensor_parallel_size + index,
                    stage=stage,
                    layers=layers,
                    parameters=count,
                    weight_bytes=count * dtype.itemsize,
                    rotary_bytes=2 * (spec.head_dim // 2) * 4,
                    activation_bytes=activation_bytes(spec, layout, dtype, limits, stage=stage, tensor_rank=index),
                    reserve_bytes=RESERVE_BYTES[device.kind],
                    budget_bytes=budget,
                    kv_bytes_per_token=kv_bytes_per_token(spec, layout, dtype, layers, index),
                    loading_bytes=loading_bytes(slices[index] * dtype.itemsize, device.kind),
                )
            )
    return tuple(ledgers)


def loading_bytes(largest_slice_bytes: int, kind: DeviceKind) -> int:
    """What loading takes of the device above the shard.

    On a CPU the largest slice is there twice while it is reordered; a GPU's weights come through a few buffers in the
    host's memory.
    """
    return LOADING_SPARE_BYTES + largest_slice_bytes if kind is DeviceKind.CPU else 0


def local_heads(heads: tuple[int, int], tensor_parallel_size: int, tensor_rank: int) -> tuple[int, int]:
    """Query and KV heads on one rank, of a layer's ``heads`` (query, KV)."""
    share = head_shares(*heads, tensor_parallel_size)[tensor_rank]
    return len(share.heads), len(share.kv_heads)


def layer_heads(spec: ModelSpec, layer: int) -> tuple[int, int]:
    """Query and KV heads of one layer: by its tensors, else by the config."""
    shape = spec.layer_shape(layer)
    return model_cuts(spec).heads[layer] or (shape.num_heads, shape.num_kv_heads)


def kv_bytes_per_token(
    spec: ModelSpec, layout: ParallelLayout, dtype: Dtype, layers: StageLayers, tensor_rank: int
) -> int:
    """KV cache of one token on one rank: itemsize x (key + value width) x the KV heads of its layers.

    A KV head that several ranks share counts on each of them.
    """
    tp = layout.tensor_parallel_size
    heads = sum(local_heads(layer_heads(spec, layer), tp, tensor_rank)[1] for layer in range(layers.start, layers.stop))
    return heads * (spec.head_dim + (spec.value_head_dim or spec.head_dim)) * dtype.itemsize


def activation_bytes(
    spec: ModelSpec, layout: ParallelLayout, dtype: Dtype, limits: Limits, *, stage: int, tensor_rank: int
) -> int:
    """An upper bound of one step's temporary tensors, with e = itemsize and T = max_num_batched_tokens.

    - residual stream, norm, a layer's input and output: 4 T hidden e
    - queries, keys and values of one layer, before and after rotation: 2 T (q + 2 kv) head_dim e
    - gate, up and their product: 3 T ffn_local e
    - attention, with W = ATTENTION_WORKSPACE_BYTES: its output in float32, T q head_dim 4; keys and values gathered
      for a slice of the batch, at most W unless one full-length sequence spread over the query heads is more,
      2 max_model_len q head_dim e; scores and mask of a slice of a prompt's rows, at most 5/4 W
    - last stage: hidden rows and float32 logits of max_num_seqs rows, this rank's share and, on its first rank,
      three whole copies (gathered, processed, sorted): max_num_seqs (hidden e + vocab_local 4 [+ 3 vocab 4])
    """
    tp, tokens, item = layout.tensor_parallel_size, limits.max_num_batched_tokens, dtype.itemsize
    widest = max({layer_heads(spec, layer) for layer in range(spec.num_layers)})
    query, kv = local_heads(widest, tp, tensor_rank)
    ffn = max(shape.ffn_size for shape in spec.distinct_layer_shapes)
    ffn_local = shard_sizes(ffn, tp)[tensor_rank]
    ffn_local *= max(1, spec.experts_per_token)
    amount = 4 * tokens * spec.hidden_size * item
    amount += 2 * tokens * (query + 2 * kv) * spec.head_dim * item
    amount += 3 * tokens * ffn_local * item
    amount += tokens * query * spec.head_dim * 4
    amount += attention_workspace_bytes(spec.head_dim, (query, kv), item, limits)
    if stage == layout.pipeline_parallel_size - 1:
        local = spec.vocab_size
        if not spec.tie_word_embeddings:
            local = shard_sizes(local, tp)[tensor_rank]
        row = spec.hidden_size * item + local * 4 + (3 * spec.vocab_size * 4 if tensor_rank == 0 else 0)
        amount += limits.max_num_seqs * row
    return amount


def attention_workspace_bytes(head_dim: int, heads: tuple[int, int], itemsize: int, limits: Limits) -> int:
    """What one layer's attention takes beside its output; ``heads``: query and KV heads of the rank."""
    query, kv = heads
    longest, whole = limits.max_model_len, ATTENTION_WORKSPACE_BYTES
    everyone = 2 * limits.max_num_seqs * longest * kv * head_dim * itemsize
    gathered = max(2 * longest * query * head_dim * itemsize, min(whole, everyone))
    scores = min(whole, query * min(limits.max_num_batched_tokens, longest) * longest * 4)
    return gathered + scores * 5 // 4


def kv_blocks(ledgers: tuple[RankLedger, ...], kind: DeviceKind, limits: Limits) -> int:
    """Blocks of the KV pool: what fits on every rank. All ranks of a replica have the same number.

    On CPU the default is 1 GiB for each rank, or one full-length sequence where that is more.
    """
    blocks = []
    for ledger in ledgers:
        block = max(1, limits.block_size * ledger.kv_bytes_per_token)
        wanted = limits.kv_cache_bytes
        if wanted is None and kind is DeviceKind.CPU:
            wanted = max(CPU_KV_CAP_BYTES, limits.blocks_per_sequence * block)
        room = ledger.room_bytes if wanted is None else min(wanted, ledger.room_bytes)
        blocks.append(max(0, room) // block)
    return min(blocks)


def misfit(ledgers: tuple[RankLedger, ...], blocks: int, limits: Limits) -> tuple[RankLedger, str] | None:
    """The fullest rank and why the layout does not fit, or None when one full-length sequence finds room."""
    if blocks >= limits.blocks_per_sequence:
        return None
    worst = min(ledgers, key=lambda ledger: ledger.room_bytes)
    if worst.room_bytes < 0:
        return worst, "weights"
    return max(ledgers, key=lambda ledger: ledger.kv_bytes_per_token), "kv"
