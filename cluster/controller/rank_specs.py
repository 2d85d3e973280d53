"""A start order and a placement -> what each rank is told. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from cluster.config.schema import ControllerConfig
from cluster.controller.actuator import StartOrder
from cluster.domain.errors import ReplicaError
from cluster.domain.ids import RankId
from cluster.domain.parallel_layout import Placement
from cluster.engine.rank_spec import RankSpec, collective_for


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
    order: StartOrder, placement: Placement, facts: tuple[HostFacts, ...], devices_on_node: int, shared: ClusterFacts
) -> tuple[RankSpec, ...]:
    """One spec per rank; ReplicaError when the leader's host has too few free rendezvous ports."""
    if len(facts[0].free_ports) < 2:
        first, last = shared.settings.rank_ports
        raise ReplicaError(
            f"{placement.ranks[0].host} has no two free ports among {', '.join(map(str, order.port_candidates))}; "
            f"free some or set rank_ports to another range than {first}-{last}."
        )
    model, config = order.model, order.model.config
    master_port, plan_port = facts[0].free_ports[:2]
    ranks_on_host = max(model.layout.tensor_parallel_size, min(devices_on_node, order.total_ranks))
    collective = collective_for(
        model.device,
        model.layout,
        hosts=len(placement.node_ids),
        ranks_on_host=ranks_on_host,
        cores_on_host=min(fact.cores for fact in facts),
    )
    if collective == "shm" and not all(fact.shm_built for fact in facts):
        collective = "gloo"
    return tuple(
        RankSpec(
            cluster_name=shared.cluster_name,
            rank_id=RankId(order.incarnation, place.rank),
            layout=model.layout,
            model_name=model.name,
            checkpoint_path=model.checkpoint_path,
            revision=model.revision,
            checkpoint_digest=model.checkpoint_digest,
            dtype=model.dtype,
            device=model.device,
            collective=collective,
            master_host=placement.ranks[0].host,
            master_port=master_port,
            plan_host=placement.ranks[0].host,
            plan_port=plan_port,
            max_model_len=model.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_waiting=config.max_num_waiting,
            block_size=config.block_size,
            kv_blocks=model.kv_blocks,
            control_address=order.control_address,
            bind_host=place.host,
            engine_port=shared.settings.engine_port,
            metrics_port=shared.settings.metrics_port,
            node_id=place.node_id,
            host=place.host,
            log_file=log_file(shared.run_dir, RankId(order.incarnation, place.rank)),
            threads=max(1, facts[place.rank].cores // ranks_on_host),
            weight_bytes=model.weight_bytes_per_rank[place.rank],
            node_dir=facts[place.rank].node_dir,
        )
        for place in placement.ranks
    )


def log_file(run_dir: str, rank_id: RankId) -> str:
    replica = rank_id.incarnation.replica
    name = f"rank-{replica.model}-{replica.slot}-g{rank_id.incarnation.generation}-r{rank_id.rank}.log"
    return str(PurePosixPath(run_dir) / "logs" / name)
