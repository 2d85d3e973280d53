"""gRPC channels and servers with the limits that both ends share."""

from __future__ import annotations

import errno

import grpc
import grpc.aio

from cluster.config.listening import listening_problem, refusal
from cluster.domain.errors import PortTakenError

MAX_MESSAGE_BYTES = 64 * 2**20
PENDING_CALLS_MAX = 65536  # calls that have come and that no handler has seen yet
KEEPALIVE_S = 20.0
KEEPALIVE_TIMEOUT_S = 10.0

_SHARED_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS = (
    *_SHARED_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long one attempt may take, greeting included: a server that is starved for a moment is not gone. One whose
    # port is closed is known at once.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
SERVER_OPTIONS = (
    *_SHARED_OPTIONS,
    # Half of what our own clients send, so that an honest client is never "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a second listener
    # Calls that have come and not reached Python yet. Beyond the first number gRPC resets some by chance, beyond the
    # second all, CANCELLED and without a word; by default that begins at 1000, one burst. Ours refuse in words.
    ("grpc.server.max_pending_requests", PENDING_CALLS_MAX),
    ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS_MAX),
)
PORTS_TRIED = 64


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel of the running event loop to ``address`` (HOST:PORT)."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def open_sync_channel(address: str) -> grpc.Channel:
    """A channel for code without an event loop."""
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def new_server() -> grpc.aio.Server:
    """For the controller; what carries tokens is served by ``cluster.wire.http2``."""
    return grpc.aio.server(options=SERVER_OPTIONS)


def bind_shared(server: grpc.aio.Server, host: str, port: int) -> int:
    """Binds a server that shares its port (``Http2Server``) to one that is held by ``reserve_port``; PortTakenError."""
    name = f"[{host}]" if ":" in host else host
    try:
        return int(server.add_insecure_port(f"{name}:{port}"))
    except RuntimeError as error:
        raise PortTakenError(f"Port {port} on {host} is not ours to share; choose another port.") from error


def bind(server: grpc.aio.Server, host: str, port: int, *, scan: bool = False) -> int:
    """Binds ``server`` to ``host:port`` (0: any) and returns the port.

    With ``scan`` the first free one of the 64 ports from ``port`` on is taken. PortTakenError when all are taken,
    another ConfigError when it is not the port that is wrong.
    """
    last = min(port + PORTS_TRIED, 65536) if scan and port else port + 1
    name = f"[{host}]" if ":" in host else host
    for candidate in range(port, last):
        # grpcio says only that it failed; a socket of our own says why.
        problem = listening_problem(host, candidate)
        if problem is not None and problem.errno != errno.EADDRINUSE:
            raise refusal(problem, host, candidate) from problem
        try:
            bound = 0 if problem else server.add_insecure_port(f"{name}:{candidate}")
        except RuntimeError:
            continue
        if bound:
            return int(bound)
    ports = f"port {port}" if last == port + 1 else f"every port from {port} to {last - 1}"
    raise PortTakenError(f"{ports.capitalize()} on {host} is taken; stop who listens there, or choose another port.")
