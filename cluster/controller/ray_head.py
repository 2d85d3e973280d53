"""Which Ray cluster answers at an address: one cheap call to its head, without becoming part of it."""

from __future__ import annotations

import grpc
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from cluster.domain.errors import ConfigError

CALL_DEADLINE_S = 3.0


def cluster_id(address: str, token: str) -> str | None:
    """The id of the Ray cluster whose head is at ``address``, None while nobody answers there.

    A head that was started again is another cluster. ConfigError when it refuses the token.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            reply = stub.GetClusterId(
                gcs_service_pb2.GetClusterIdRequest(),
                timeout=CALL_DEADLINE_S,
                metadata=(("authorization", f"Bearer {token}"),),
                wait_for_ready=True,
            )
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise ConfigError(
                    f"The head at {address} refuses the token; give a copy of its own with --token-file."
                ) from error
            return None
    return str(reply.cluster_id.hex()) or None


def must_end(joined: str, found: str | None) -> bool:
    """Whether a node that joined one head must end, now that another answers. Tokens flow while a head is away."""
    return found is not None and found != joined
