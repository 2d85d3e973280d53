"""What one rank process is told when it starts. Standard library and domain only; it travels pickled over Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.domain.hardware import DeviceKind
from cluster.domain.ids import RankId
from cluster.domain.model_spec import Dtype
from cluster.domain.parallel_layout import ParallelLayout

Collective = Literal["shm", "gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class RankSpec:
    """Everything a rank needs to know; nothing is read from its environment.

    ``checkpoint_path`` is a directory that exists on the rank's node, or a hub id that is resolved there at
    ``revision``. ``master_*`` is the torch store of this incarnation, ``plan_*`` where the leader hands out
    step plans; both ports belong to this incarnation alone. ``engine_port`` and ``metrics_port`` are the
    first ones tried. ``weight_bytes``: what this rank will read, from the plan. ``threads``: for torch.
    ``node_dir``: where the rank leaves its record for whoever watches its node; "" for nowhere.
    """

    cluster_name: str
    rank_id: RankId
    layout: ParallelLayout
    model_name: str
    checkpoint_path: str
    revision: str | None
    checkpoint_digest: str
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

    def __post_init__(self) -> None:
        assert 0 <= self.rank_id.rank < self.layout.world_size, self.rank_id
        assert self.threads >= 1, self.threads
        assert self.kv_blocks >= 1, self.kv_blocks

    @property
    def rank(self) -> int:
        return self.rank_id.rank

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def is_leader(self) -> bool:
        return self.rank_id.rank == 0


def collective_for(
    device: DeviceKind, layout: ParallelLayout, *, hosts: int, ranks_on_host: int, cores_on_host: int
) -> Collective:
    """How the ranks of one replica add up: NCCL on CUDA, shared memory where it is correct, gloo elsewhere.

    DeepSpeed's shared-memory all-reduce knows one group per world, on one host, and it spins: it wants no
    more ranks on the host than cores. ``hosts``: that the replica spans; ``ranks_on_host``: of all replicas.
    """
    if device is DeviceKind.CUDA:
        return "nccl"
    one_group = layout.pipeline_parallel_size == 1 and layout.tensor_parallel_size > 1
    return "shm" if one_group and hosts == 1 and ranks_on_host <= cores_on_host else "gloo"
