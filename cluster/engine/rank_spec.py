"""What one rank process is told when it starts. Standard library and domain only; it travels pickled over Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.domain.hardware import DeviceKind
from cluster.domain.ids import RankId
from cluster.domain.model_spec import Dtype
from cluster.domain.parallel_layout import ParallelLayout, Stage, StageLayers

Collective = Literal["shm", "gloo", "nccl"]
LoadFormat = Literal["auto", "dummy"]


@dataclass(frozen=True, slots=True)
class RankSpec:
    """Everything a rank needs to know; nothing is read from its environment.

    ``checkpoint_path`` is a directory that exists on the rank's node, or a hub id that is resolved there at
    ``revision``; its files must have ``checkpoint_digest``. ``served_digest``: the controller's name for these weights
    loaded in this way, which routers compare. ``stages``: the decoder layers of every pipeline stage; () for one with
    all of them. ``master_*`` is the torch store of this rank's stage, ``plan_*`` where the leader hands out step plans,
    ``link_port`` where this rank takes hidden states from its tensor rank in the stage before (0 in the first stage),
    ``next_*`` the same of the stage after it ("" and 0 in the last); all these ports belong to this incarnation alone.
    ``engine_port`` and ``metrics_port`` are the first ones tried. ``weight_bytes``: what this rank will read, from the
    plan. ``threads``: for torch. ``node_dir``: where the rank leaves its record for whoever watches its node; "" for
    nowhere. ``load_format``: "dummy" makes the weights up from ``seed`` instead of reading any. ``prefill_slowdown``:
    how many times its own time a step with decodes may take because of a prompt beside them. ``rope_scaling``: JSON
    that replaces the checkpoint's.
    """

    cluster_name: str
    rank_id: RankId
    layout: ParallelLayout
    stages: tuple[StageLayers, ...]
    model_name: str
    checkpoint_path: str
    revision: str | None
    checkpoint_digest: str
    served_digest: str
    dtype: Dtype
    device: DeviceKind
    collective: Collective
    master_host: str
    master_port: int
    plan_host: str
    plan_port: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    block_size: int
    kv_blocks: int
    control_address: str
    bind_host: str
    engine_port: int
    metrics_port: int
    node_id: str
    host: str
    log_file: str
    threads: int
    weight_bytes: int
    node_dir: str = ""
    link_port: int = 0
    next_host: str = ""
    next_port: int = 0
    load_format: LoadFormat = "auto"
    seed: int = 0
    enable_prefix_caching: bool = True
    max_waiting_prompt_tokens: int = 2**31
    prefill_slowdown: float = 1.7
    rope_scaling: str | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank_id.rank < self.layout.world_size, self.rank_id
        assert self.threads >= 1, self.threads
        assert self.kv_blocks >= 1, self.kv_blocks
        assert len(self.stages or (0,)) == self.layout.pipeline_parallel_size, self.stages
        assert (self.link_port > 0) == (self.stage_index > 0), self
        assert (self.next_port > 0) == (self.stage_index + 1 < self.layout.pipeline_parallel_size), self

    @property
    def rank(self) -> int:
        return self.rank_id.rank

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def stage_index(self) -> int:
        return self.layout.stage_of(self.rank)

    def stage(self, num_layers: int) -> Stage:
        """Of this rank, in a model of ``num_layers``."""
        layers = self.stages[self.stage_index] if self.stages else StageLayers(0, num_layers)
        return Stage(self.stage_index, self.layout.pipeline_parallel_size, layers)

    @property
    def tensor_rank(self) -> int:
        """Its place in its stage's TP group."""
        return self.layout.tensor_rank_of(self.rank)

    @property
    def sampling_rank(self) -> int:
        """The first rank of the last stage; the leader where there is one stage."""
        return self.layout.world_size - self.layout.tensor_parallel_size

    @property
    def is_leader(self) -> bool:
        return self.rank_id.rank == 0


def collective_for(
    device: DeviceKind, tensor_parallel_size: int, *, hosts: int, ranks_on_host: int, cores_on_host: int
) -> Collective:
    """How the ranks of one stage add up: NCCL on CUDA, shared memory where it is correct, gloo elsewhere.

    DeepSpeed's shared-memory all-reduce knows one group per world, on one host, and it spins: it wants no
    more ranks on the host than cores. Every stage is a world of its own, so it is open to each whose ranks share a
    host. ``hosts``: that the stage spans; ``ranks_on_host``: of all stages and replicas.
    """
    if device is DeviceKind.CUDA:
        return "nccl"
    return "shm" if tensor_parallel_size > 1 and hosts == 1 and ranks_on_host <= cores_on_host else "gloo"
