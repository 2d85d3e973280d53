"""Adapter: cluster.v1.Inference and Routing on a gRPC server. What no message of ours is, is its sender's fault."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from cluster.domain.errors import RejectReason, RequestRejected
from cluster.domain.request import Outcome
from cluster.router.server import InferenceServer
from cluster.v1 import inference_pb2, routing_pb2
from cluster.wire.http2.server import Http2Server
from cluster.wire.status import to_rpc_status

_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    routing_pb2.DESCRIPTOR.services_by_name["Routing"],
)
_METHODS = tuple(method for service in _SERVICES for method in service.methods)
_COUNTED = ("Generate", "Complete")  # requests, which are counted by how they end
_COUNTED_PATHS = frozenset(f"/{_SERVICES[0].full_name}/{name}" for name in _COUNTED)
_UNSERVED = {  # outcomes of calls that ended before their request was read, by what their clients were told
    None: Outcome.ABORTED_CLIENT,
    grpc.StatusCode.DEADLINE_EXCEEDED: Outcome.EVICTED_DEADLINE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Outcome.REJECTED_CAPACITY,
    grpc.StatusCode.UNAVAILABLE: Outcome.REJECTED_UNAVAILABLE,
}
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Method = Callable[[Message | None, _Context], Awaitable[Message | None]]
_UNDECODABLE = "The message is no {} of cluster.v1; send one that was made from its protos."


def _decoder(message: type[Message]) -> Callable[[bytes], Message | None]:
    """None for what cannot be decoded: gRPC itself would call it UNKNOWN, which looks like a bug of ours."""

    def decode(raw: bytes) -> Message | None:
        try:
            return message.FromString(raw)
        except DecodeError:
            return None

    return decode


DECODERS = {method.name: _decoder(GetMessageClass(method.input_type)) for method in _METHODS}


def inference_handlers(server: InferenceServer) -> dict[str, Method]:
    """The methods by name; each takes what its decoder made."""
    return {method.name: _method(server, method.name, method.input_type.name) for method in _METHODS}


def _method(server: InferenceServer, name: str, message: str) -> Method:
    answer = getattr(server, name)

    async def handle(request: Message | None, context: _Context) -> Message | None:
        if request is None:
            if name in _COUNTED:
                server.count_unserved(Outcome.REJECTED_INVALID)
            error = RequestRejected(RejectReason.INVALID, _UNDECODABLE.format(message))
            await context.abort_with_status(to_rpc_status(error))
        answered: Message | None = await answer(request, context)
        return answered

    return handle


def _count_unserved(server: InferenceServer, path: str, code: grpc.StatusCode | None) -> None:
    if path in _COUNTED_PATHS:
        server.count_unserved(_UNSERVED.get(code, Outcome.REJECTED_INVALID))


def add_inference(server: InferenceServer, grpc_server: Http2Server) -> None:
    """In place of the generated functions ``add_..._to_server`` of both services."""
    grpc_server.on_unserved = partial(_count_unserved, server)
    handlers = inference_handlers(server)
    for service in _SERVICES:
        made = {}
        for method in service.methods:
            streams = method.server_streaming
            kind = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
            made[method.name] = kind(
                handlers[method.name],
                request_deserializer=DECODERS[method.name],
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
        grpc_server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, made),))
        grpc_server.add_registered_method_handlers(service.full_name, made)
