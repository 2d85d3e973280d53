"""Adapter: cluster.v1.Inference and Routing on a gRPC server. What no message of ours is, is its sender's fault."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from cluster.domain.errors import RejectReason, RequestRejected
from cluster.domain.request import Outcome
from cluster.router.server import InferenceServer
from cluster.router.validation import CHAT_MESSAGES_MAX, LOGIT_BIAS_MAX
from cluster.v1 import inference_pb2, routing_pb2
from cluster.wire.http2.server import Http2Server
from cluster.wire.message_shape import Bounds, MessageShape
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
Method = Callable[[Message | str, _Context], Awaitable[Message | None]]
_UNDECODABLE = "The message is no {} of cluster.v1; send one that was made from its protos."
LOOKED_AT_BYTES = 2**16  # what a shorter message can hold is decoded in a moment
# Of fields what validation takes, and room: a message of a chat has three, and so has a bias. The numbers are token
# ids, of which contexts have a million.
BOUNDS = Bounds(fields=4 * CHAT_MESSAGES_MAX + 4 * LOGIT_BIAS_MAX, numbers=2**22, unknown_bytes=LOOKED_AT_BYTES)


def _decoder(descriptor: Descriptor) -> Callable[[bytes], Message | str]:
    """A sentence for what cannot be decoded, or holds too much: gRPC itself would call it UNKNOWN, like a bug of ours.

    A message holds nothing in memory but what it says: it waits as long as its request does.
    """
    message, undecodable = GetMessageClass(descriptor), _UNDECODABLE.format(descriptor.name)
    excess = MessageShape(descriptor, BOUNDS).excess

    def decode(raw: bytes) -> Message | str:
        if len(raw) > LOOKED_AT_BYTES and (refusal := excess(raw)):
            return refusal
        try:
            decoded = message.FromString(raw)
        except DecodeError:
            return undecodable
        # What came and does not count stays in a decoded message's memory: unknown fields, other sides of a oneof, what
        # a later field has replaced. No queue has a bound for that.
        decoded.DiscardUnknownFields()
        made = message()
        made.CopyFrom(decoded)
        return made

    return decode


DECODERS = {method.name: _decoder(method.input_type) for method in _METHODS}


def inference_handlers(server: InferenceServer) -> dict[str, Method]:
    """The methods by name; each takes what its decoder made."""
    return {method.name: _method(server, method.name) for method in _METHODS}


def _method(server: InferenceServer, name: str) -> Method:
    answer = getattr(server, name)

    def handle(request: Message | str, context: _Context) -> Awaitable[Message | None]:
        if isinstance(request, str):
            if name in _COUNTED:
                server.count_unserved(Outcome.REJECTED_INVALID)
            return context.abort_with_status(to_rpc_status(RequestRejected(RejectReason.INVALID, request)))
        answered: Awaitable[Message | None] = answer(request, context)
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
