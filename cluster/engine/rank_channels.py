"""Every connection of one rank to the others of its replica: plans, hidden states, and the watch over all of them.

The ranks open them before they load: listeners first, then they knock, then they let in, so that nobody waits for
somebody who waits for him.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import torch

from cluster.domain.clock import Clock
from cluster.engine import stage_link
from cluster.engine.plan_channel import PlanReceiver, PlanSender
from cluster.engine.rank_socket import Hello, watch_peers
from cluster.engine.rank_spec import RankSpec
from cluster.engine.stage_link import HiddenShape, SocketStageReceiver, SocketStageSender


class RankChannels:
    """``sender``: the leader's, where there are others; ``receiver``: everybody else's. Links: to neighbours.

    ``lost`` is called, from another thread, when a peer is gone. ``hidden_size``: columns of what stages hand on.
    """

    def __init__(self, spec: RankSpec, hidden_size: int, lost: Callable[[str], None]) -> None:
        self._spec, self._lost = spec, lost
        self.sender: PlanSender | None = None
        self.receiver: PlanReceiver | None = None
        self.incoming: SocketStageReceiver | None = None
        self.outgoing: SocketStageSender | None = None
        incarnation = spec.rank_id.incarnation
        if spec.is_leader and spec.world_size > 1:
            self.sender = PlanSender(spec.plan_host, spec.plan_port, incarnation, spec.sampling_rank, lost)
        elif not spec.is_leader:
            self.receiver = PlanReceiver(spec.plan_host, spec.plan_port, incarnation, spec.rank)
        if spec.link_port:
            shape = HiddenShape(spec.max_num_batched_tokens, hidden_size, getattr(torch, spec.dtype.value))
            device = torch.device(spec.device.value)
            self.incoming = SocketStageReceiver(spec.bind_host, spec.link_port, shape, device)

    def open(self, deadline_s: float, clock: Clock) -> None:
        """Meets everybody; EngineFailed names who did not come within ``deadline_s``."""
        spec = self._spec
        incarnation = spec.rank_id.incarnation
        if spec.next_port:
            hello = Hello(stage_link.CHANNEL, incarnation, spec.rank)
            address = (spec.next_host, spec.next_port)
            self.outgoing = SocketStageSender.connect(address, hello, deadline_s, clock, self._lost)
        if self.receiver is not None:
            self.receiver.connect(deadline_s, clock)
        if self.sender is not None:
            self.sender.accept(spec.world_size, deadline_s, clock)
        if self.incoming is not None:
            before = spec.rank - spec.layout.tensor_parallel_size
            self.incoming.accept(Hello(stage_link.CHANNEL, incarnation, before), deadline_s, clock)
        watch_peers(self._sockets(), lambda who: self._lost(f"{who} is gone."))

    def _sockets(self) -> dict[str, socket.socket]:
        spec, tp = self._spec, self._spec.layout.tensor_parallel_size
        sockets: dict[str, socket.socket] = {}
        if self.sender is not None:
            sockets.update(self.sender.sockets)
        if self.receiver is not None:
            sockets.update(self.receiver.sockets)
        if self.incoming is not None:
            sockets[f"Rank {spec.rank - tp} of the stage before"] = self.incoming.socket
        if self.outgoing is not None:
            sockets[f"Rank {spec.rank + tp} of the next stage"] = self.outgoing.socket
        return sockets
