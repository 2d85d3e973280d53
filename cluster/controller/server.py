"""The Control service on gRPC: messages in, the loop's methods, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from cluster.config.schema import MAX_DRAIN_S
from cluster.controller.cluster_status import ProcessFacts
from cluster.controller.loop import ControllerLoop
from cluster.controller.messages import plan_summary, report_from_message
from cluster.domain.errors import ClusterError, ConfigError
from cluster.domain.ids import ReplicaId
from cluster.telemetry.logs import get_logger
from cluster.v1 import control_pb2, control_pb2_grpc
from cluster.wire.convert import endpoint_table_to_message
from cluster.wire.deployment import deployment_from_message
from cluster.wire.status import to_rpc_status

MAX_REPLICAS = 10_000
ATTENDING = ("router", "worker")  # kinds of processes
Context = grpc.aio.ServicerContext[Any, Any]


class ControlService(control_pb2_grpc.ControlServicer):
    """Adapter. ``on_shutdown`` is called once nothing is left and the answer is on its way."""

    def __init__(self, loop: ControllerLoop, on_shutdown: Callable[[], None]) -> None:
        self._loop = loop
        self._on_shutdown = on_shutdown
        self._closing = False
        self._endings: set[asyncio.Task[None]] = set()
        self._log = get_logger()

    def close(self) -> None:
        """Streams that end from now on are our doing, not their ranks'."""
        self._closing = True

    async def Apply(self, request: control_pb2.ApplyRequest, context: Context) -> control_pb2.ApplyResponse:
        try:
            configs = tuple(deployment_from_message(m) for m in request.spec.models)
            desired = await self._loop.apply(configs)
        except Exception as error:  # boundary: every error becomes a status
            await self._refuse(context, error)
        return control_pb2.ApplyResponse(plans=[plan_summary(model) for model in desired])

    async def GetStatus(self, _request: control_pb2.GetStatusRequest, _context: Context) -> control_pb2.ClusterStatus:
        return self._loop.status()

    async def Scale(self, request: control_pb2.ScaleRequest, context: Context) -> control_pb2.ScaleResponse:
        try:
            await self._loop.scale(request.model, _replicas(request.replicas))
        except Exception as error:  # boundary: every error becomes a status
            await self._refuse(context, error)
        return control_pb2.ScaleResponse()

    async def Drain(self, request: control_pb2.DrainRequest, context: Context) -> control_pb2.DrainResponse:
        try:
            await self._loop.drain(ReplicaId.parse(request.replica), _deadline(request.deadline_s, "deadline_s"))
        except Exception as error:  # boundary: every error becomes a status
            await self._refuse(context, error)
        return control_pb2.DrainResponse()

    async def DrainNode(self, request: control_pb2.DrainNodeRequest, context: Context) -> control_pb2.DrainNodeResponse:
        try:
            await self._loop.drain_node(request.node, _deadline(request.deadline_s, "deadline_s"))
        except Exception as error:  # boundary: every error becomes a status
            await self._refuse(context, error)
        return control_pb2.DrainNodeResponse()

    async def Shutdown(self, request: control_pb2.ShutdownRequest, context: Context) -> control_pb2.ShutdownResponse:
        try:
            deadline_s = _deadline(request.drain_deadline_s, "drain_deadline_s")
            ending = asyncio.get_running_loop().create_task(self._shut_down(deadline_s))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            # Goes on to its end when the one who asked does not wait for it.
            await asyncio.shield(ending)
        except Exception as error:  # boundary: every error becomes a status
            await self._refuse(context, error)
        return control_pb2.ShutdownResponse()

    async def _shut_down(self, deadline_s: float) -> None:
        try:
            await self._loop.shutdown(deadline_s)
        except ClusterError as error:
            self._log.error("shutdown_failed", caused_by=str(error))
            raise
        self._on_shutdown()

    async def ExplainPlacement(
        self, request: control_pb2.ExplainPlacementRequest, context: Context
    ) -> control_pb2.PlacementExplanation:
        try:
            found = await self._loop.explain(deployment_from_message(request.deployment))
        except Exception as error:  # boundary: every error becomes a status
            await self._refuse(context, error)
        return control_pb2.PlacementExplanation(feasible=found.feasible, text=found.text, json=found.json)

    async def WatchEndpoints(
        self, request: control_pb2.WatchEndpointsRequest, context: Context
    ) -> AsyncIterator[control_pb2.EndpointTable]:
        router = ProcessFacts("router", request.pid, request.node, dict(request.ports))
        try:
            async with aclosing(self._loop.watch_endpoints(router)) as tables:
                async for table in tables:
                    yield endpoint_table_to_message(table)
        except ClusterError as error:
            await self._refuse(context, error)

    async def Attend(
        self, request: control_pb2.ProcessStatus, context: Context
    ) -> AsyncIterator[control_pb2.AttendResponse]:
        try:
            if request.kind not in ATTENDING:
                raise ConfigError(
                    f"kind is {request.kind!r}; only a {' or '.join(ATTENDING)} attends, ranks have streams."
                )
            process = ProcessFacts(request.kind, request.pid, request.node, dict(request.ports))
            with self._loop.attendance.present(process):
                yield control_pb2.AttendResponse()
                await asyncio.Event().wait()  # until the stream ends, which cancels this
        except ClusterError as error:
            await self._refuse(context, error)

    async def ReportRank(
        self, request_iterator: AsyncIterator[control_pb2.RankReport], _context: Context
    ) -> control_pb2.ReportRankResponse:
        rank_id, stream = None, object()
        try:
            async for message in request_iterator:
                report = report_from_message(message)
                rank_id = rank_id or report.rank_id
                if report.rank_id == rank_id:  # one stream speaks for one rank
                    self._loop.take_report(report, stream)
        finally:
            if rank_id is not None and not self._closing:
                self._loop.rank_stream_ended(rank_id, stream)
        return control_pb2.ReportRankResponse()

    async def _refuse(self, context: Context, error: Exception) -> None:
        if not isinstance(error, ClusterError):
            self._log.error("control_call_failed", caused_by=repr(error), exc_info=error)
        await context.abort_with_status(to_rpc_status(error))


def _replicas(count: int) -> int:
    if count > MAX_REPLICAS:
        raise ConfigError(f"replicas is {count}; at most {MAX_REPLICAS} can be asked for.")
    return count


def _deadline(seconds: float, name: str) -> float:
    if not 0 <= seconds <= MAX_DRAIN_S:
        raise ConfigError(f"{name} is {seconds}; give 0 to {MAX_DRAIN_S:.0f} seconds.")
    return seconds
