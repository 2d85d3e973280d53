"""A start order and a placement -> what each rank is told. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from cluster.config.schema import ControllerConfig
from cluster.controller.actuator import StartOrder
from cluster.controller.rendezvous import assign_ports
from cluster.domain.ids import RankId
from cluster.domain.parallel_layout import Placement, RankPlacement
from cluster.engine.rank_spec import Collective, RankSpec, collective_for
from cluster.planner.evaluate import step_tokens


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a rank's process found on its host.

    ``free_ports``: those of the candidates nobody listens on. ``shm_built``: DeepSpeed's shared-memory kernel is there.
    ``node_dir``: run directory of the node, "" when the node was not started by us.
    """

    pid: int
    cores: int
    free_ports: tuple[int, ...]
    shm_built: bool = True
    node_dir: str = ""


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """What all ranks share."""

    cluster_name: str
    run_dir: str
    settings: ControllerConfig


def rank_specs(
    order: StartOrder,
    placement: Placement,
    facts: tuple[HostFacts, ...],
    devices: Mapping[str, int],
    shared: ClusterFacts,
    served_digest: str,
) -> tuple[RankSpec, ...]:
    """One spec per rank; ReplicaError when a host has too few free rendezvous ports. ``devices``: by node's id."""
    model, layout, config = order.model, order.model.layout, order.model.config
    free_ports = [fact.free_ports for fact in facts]
    meeting = assign_ports(layout, placement, free_ports, order.port_candidates, shared.settings.rank_ports)
    crowds = _ranks_on_hosts(order, placement, devices)
    collectives = _collectives(order, placement, facts, crowds)
    hosts = [place.host for place in placement.ranks]
    tp = layout.tensor_parallel_size

    def spec(place: RankPlacement) -> RankSpec:
        rank, stage, successor = place.rank, layout.stage_of(place.rank), place.rank + tp
        in_last = successor >= layout.world_size
        return RankSpec(
            cluster_name=shared.cluster_name,
            rank_id=RankId(order.incarnation, rank),
            layout=layout,
            stages=model.stages,
            model_name=model.name,
            checkpoint_path=model.checkpoint_path,
            revision=model.revision,
            checkpoint_digest=model.checkpoint_digest,
            served_digest=served_digest,
            dtype=model.dtype,
            device=model.device,
            collective=collectives[stage],
            master_host=hosts[stage * tp],
            master_port=meeting.master_ports[stage],
            plan_host=hosts[0],
            plan_port=meeting.plan_port,
            max_model_len=model.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=step_tokens(config, model.device),
            max_num_waiting=config.max_num_waiting,
            block_size=config.block_size,
            kv_blocks=model.kv_blocks,
            control_address=order.control_address,
            bind_host=place.host,
            engine_port=shared.settings.engine_port,
            metrics_port=shared.settings.metrics_port,
            node_id=place.node_id,
            host=place.host,
            log_file=log_file(shared.run_dir, RankId(order.incarnation, rank)),
            threads=max(1, facts[rank].cores // crowds[place.node_id]),
            weight_bytes=model.weight_bytes_per_rank[rank],
            node_dir=facts[rank].node_dir,
            link_port=meeting.link_ports[rank],
            next_host="" if in_last else hosts[successor],
            next_port=0 if in_last else meeting.link_ports[successor],
            rope_scaling=config.rope_scaling,
            prefill_slowdown=config.prefill_slowdown,
            max_waiting_prompt_tokens=config.max_waiting_prompt_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            seed=config.seed,
            load_format=config.load_format,
        )

    return tuple(spec(place) for place in placement.ranks)


def _ranks_on_hosts(order: StartOrder, placement: Placement, devices: Mapping[str, int]) -> dict[str, int]:
    """Ranks that each host may come to hold, of this replica's stages and of other replicas; by node's id."""
    own = Counter(place.node_id for place in placement.ranks)
    return {node_id: max(count, min(devices[node_id], order.total_ranks)) for node_id, count in own.items()}


def _collectives(
    order: StartOrder, placement: Placement, facts: tuple[HostFacts, ...], crowds: Mapping[str, int]
) -> list[Collective]:
    """How each stage adds up."""
    model, tp = order.model, order.model.layout.tensor_parallel_size
    chosen: list[Collective] = []
    for first in range(0, model.layout.world_size, tp):
        places, of_stage = placement.ranks[first : first + tp], facts[first : first + tp]
        collective = collective_for(
            model.device,
            tp,
            hosts=len({place.node_id for place in places}),
            ranks_on_host=max(crowds[place.node_id] for place in places),
            cores_on_host=min(fact.cores for fact in of_stage),
        )
        if collective == "shm" and not all(fact.shm_built for fact in of_stage):
            collective = "gloo"
        chosen.append(collective)
    return chosen


def log_file(run_dir: str, rank_id: RankId) -> str:
    replica = rank_id.incarnation.replica
    name = f"rank-{replica.model}-{replica.slot}-g{rank_id.incarnation.generation}-r{rank_id.rank}.log"
    return str(PurePosixPath(run_dir) / "logs" / name)
