"""The operator's client of the controller: cluster.v1.Control, with the domain's errors."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from cluster.config.schema import ModelConfig
from cluster.domain.errors import ClusterError, ConfigError, NoFeasiblePlan, ReplicaError
from cluster.v1 import control_pb2, control_pb2_grpc
from cluster.wire.channel import open_sync_channel
from cluster.wire.deployment import deployment_to_message
from cluster.wire.status import from_rpc_error

CALL_DEADLINE_S = 20.0
# Planning reads headers, and a hub model is fetched first.
APPLY_DEADLINE_S = 3600.0
SHUTDOWN_MARGIN_S = 150.0

Answer = TypeVar("Answer")


class ControllerUnreachable(ClusterError):  # noqa: N818 - what is so, not what went wrong
    """Nobody answers at the controller's address."""


class ControlClient:
    """One channel to the controller at ``address`` (HOST:PORT). Methods raise the domain's errors."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = open_sync_channel(address)
        self._stub = control_pb2_grpc.ControlStub(self._channel)

    def apply(self, models: tuple[ModelConfig, ...]) -> control_pb2.ApplyResponse:
        """Replaces the desired state; nothing changes when one of ``models`` is refused."""
        spec = control_pb2.ClusterSpec(models=[deployment_to_message(model) for model in models])
        request = control_pb2.ApplyRequest(spec=spec)
        answer: control_pb2.ApplyResponse = self._call(self._stub.Apply, request, APPLY_DEADLINE_S)
        return answer

    def status(self, deadline_s: float = CALL_DEADLINE_S) -> control_pb2.ClusterStatus:
        request = control_pb2.GetStatusRequest()
        answer: control_pb2.ClusterStatus = self._call(self._stub.GetStatus, request, deadline_s)
        return answer

    def scale(self, model: str, replicas: int) -> None:
        """Returns when it is desired; replicas start and end afterwards."""
        self._call(self._stub.Scale, control_pb2.ScaleRequest(model=model, replicas=replicas), CALL_DEADLINE_S)

    def drain(self, replica: str, deadline_s: float) -> None:
        """Returns when the replica takes nothing new any more."""
        self._call(self._stub.Drain, control_pb2.DrainRequest(replica=replica, deadline_s=deadline_s), CALL_DEADLINE_S)

    def drain_node(self, node: str, deadline_s: float) -> None:
        """Returns when no rank is left on the node that others reach at ``node``."""
        request = control_pb2.DrainNodeRequest(node=node, deadline_s=deadline_s)
        self._call(self._stub.DrainNode, request, deadline_s + SHUTDOWN_MARGIN_S)

    def shut_down(self, drain_s: float) -> None:
        """Returns when no replica, actor or placement group is left."""
        request = control_pb2.ShutdownRequest(drain_deadline_s=drain_s)
        self._call(self._stub.Shutdown, request, drain_s + SHUTDOWN_MARGIN_S)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Callable[..., Answer], request: Message, deadline_s: float) -> Answer:
        try:
            return method(request, timeout=deadline_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _translated(self, error: grpc.RpcError) -> ClusterError:
        code, reason, message, _ = from_rpc_error(error)
        if code is grpc.StatusCode.UNAVAILABLE and not reason:
            return ControllerUnreachable(
                f"No controller answers at {self.address}; start one with 'llm-cluster serve'."
            )
        if reason == NoFeasiblePlan.__name__:
            return NoFeasiblePlan(message)
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION):
            return ConfigError(message)
        return ReplicaError(f"The controller at {self.address} could not do it ({code.name}): {message}")
