from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import grpc
import pytest

from cluster.config.listening import can_listen, reserve_port
from cluster.domain.errors import ConfigError, PortTakenError
from cluster.wire import channel
from cluster.wire.http2.server import Http2Server


@pytest.fixture
async def server() -> AsyncIterator[grpc.aio.Server]:
    server = channel.new_server()
    yield server
    await server.stop(None)


async def test_any_port(server: grpc.aio.Server) -> None:
    assert channel.bind(server, "127.0.0.1", 0) > 0


async def test_a_taken_port_is_named(server: grpc.aio.Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"Port {port} on 127.0.0.1 is taken"):
            channel.bind(server, "127.0.0.1", port)


async def test_an_address_that_is_not_ours_is_no_taken_port(server: grpc.aio.Server) -> None:
    with pytest.raises(ConfigError, match="no address of this machine") as refused:
        channel.bind(server, "192.0.2.1", 50051, scan=True)
    assert not isinstance(refused.value, PortTakenError)


@pytest.mark.skipif(not can_listen("::1", 0), reason="this machine has no IPv6 loopback")
async def test_ipv6(server: grpc.aio.Server) -> None:
    assert channel.bind(server, "::1", 0) > 0


async def test_a_scan_takes_the_next_free_one(server: grpc.aio.Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert port < channel.bind(server, "127.0.0.1", port, scan=True) < port + channel.PORTS_TRIED


async def test_two_servers_never_share_a_port(server: grpc.aio.Server) -> None:
    port = channel.bind(server, "127.0.0.1", 0)
    second = channel.new_server()
    with pytest.raises(PortTakenError):
        channel.bind(second, "127.0.0.1", port)
    await second.stop(None)


def test_both_ends_agree_on_limits() -> None:
    ours, theirs = dict(channel.CHANNEL_OPTIONS), dict(channel.SERVER_OPTIONS)
    for name in ("grpc.max_send_message_length", "grpc.max_receive_message_length"):
        assert ours[name] == theirs[name] == 64 * 2**20
    assert ours["grpc.keepalive_time_ms"] == theirs["grpc.keepalive_time_ms"] == 20_000
    # A server that allows fewer pings than its clients send cuts them off.
    assert theirs["grpc.http2.min_recv_ping_interval_without_data_ms"] < ours["grpc.keepalive_time_ms"]


async def test_servers_share_a_port_that_is_held_for_them_and_nobody_else_does(server: grpc.aio.Server) -> None:
    with reserve_port("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        shared = [Http2Server(shared=True) for _ in range(2)]
        assert [channel.bind_shared(one, "127.0.0.1", port) for one in shared] == [port, port]
        with pytest.raises(PortTakenError):
            channel.bind(server, "127.0.0.1", port)
        with pytest.raises(PortTakenError, match="choose another port"):
            reserve_port("127.0.0.1", port)
        for one in shared:
            await one.stop(None)


async def test_a_port_of_somebody_else_is_not_shared() -> None:
    shared = Http2Server(shared=True)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(PortTakenError, match="not ours to share"):
        channel.bind_shared(shared, "127.0.0.1", other.getsockname()[1])
    await shared.stop(None)
