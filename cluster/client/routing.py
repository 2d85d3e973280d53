"""Adapter: asks a router where a request would go."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from cluster.client.requests import Prompt, build_request, error_of_call
from cluster.config.schema import ROUTER_ADDRESS
from cluster.domain.errors import ClusterError
from cluster.v1 import routing_pb2, routing_pb2_grpc
from cluster.wire import channel
from cluster.wire.caller import caller_to_metadata
from cluster.wire.status import from_rpc_error


def explain_route(
    prompt: Prompt,
    addresses: Sequence[str] = (ROUTER_ADDRESS,),
    *,
    model: str = "",
    session_id: str = "",
    cache_salt: str = "",
    timeout_s: float = 30.0,
) -> routing_pb2.RouteExplanation:
    """What the first router that answers thinks of every endpoint for this request; nothing is generated.

    While no replica of the model is up, it is told what keeps each of them out, and ``prompt_tokens`` is 0 unless the
    prompt is token ids. Errors are those of ``Client.complete``: ModelNotFound, RequestRejected.
    """
    request = build_request(prompt, {}, model=model, cache_salt=cache_salt)
    metadata = caller_to_metadata(session_id=session_id)
    failure: ClusterError | None = None
    for address in addresses:
        try:
            with channel.open_sync_channel(address) as opened:
                stub = routing_pb2_grpc.RoutingStub(opened)
                answer: routing_pb2.RouteExplanation = stub.ExplainRoute(request, timeout=timeout_s, metadata=metadata)
                return answer
        except grpc.RpcError as error:
            failure = error_of_call(from_rpc_error(error), address)
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                break
    assert failure is not None, "there is an address"
    raise failure
