"""Degrees, and which rank sits where."""

from __future__ import annotations

from dataclasses import dataclass

# Attention works in slices whose temporary tensors stay below this; the planner's ledger counts on it.
ATTENTION_WORKSPACE_BYTES = 256 * 2**20
# DeepSpeed splits dimensions that are not made of heads in grains of this many columns.
GRAIN_COLUMNS = 64


@dataclass(frozen=True, slots=True, order=True)
class ParallelLayout:
    """Tensor-parallel degree within a stage, and the number of pipeline stages."""

    tensor_parallel_size: int
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        assert self.tensor_parallel_size >= 1, self
        assert self.pipeline_parallel_size >= 1, self

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def stage_of(self, rank: int) -> int:
        """Ranks are numbered stage by stage: a stage's TP group is contiguous."""
        return rank // self.tensor_parallel_size

    def tensor_rank_of(self, rank: int) -> int:
        return rank % self.tensor_parallel_size

    def __str__(self) -> str:
        return f"TP{self.tensor_parallel_size} x PP{self.pipeline_parallel_size}"


@dataclass(frozen=True, slots=True)
class StageLayers:
    """The decoder layers of one pipeline stage: ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage of ``count``: its place, and its decoder layers."""

    index: int
    count: int
    layers: StageLayers

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count, self

    @property
    def is_first(self) -> bool:
        """It embeds the tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """It has the norm and the head, and its first rank samples."""
        return self.index == self.count - 1


def grain_size(size: int, tensor_parallel_size: int) -> int:
    """DeepSpeed's ``tp_grain_size`` for a dimension: 64, or the largest lower power of two that leaves no rank empty.

    Planner and engine both call this, so that the ledger and the shards agree.
    """
    grain = GRAIN_COLUMNS
    while grain > 1 and size // grain < tensor_parallel_size:
        grain //= 2
    return grain


@dataclass(frozen=True, slots=True)
class RankPlacement:
    """One rank on one node."""

    rank: int
    node_id: str
    host: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Every rank of one replica, in rank order."""

    ranks: tuple[RankPlacement, ...]

    def __post_init__(self) -> None:
        assert [r.rank for r in self.ranks] == list(range(len(self.ranks))), self.ranks

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Distinct nodes, in rank order."""
        return tuple(dict.fromkeys(r.node_id for r in self.ranks))
