from __future__ import annotations

import errno
import socket

import pytest

from cluster.config.listening import can_listen, refusal, require_free
from cluster.domain.errors import ConfigError, PortTakenError


def test_a_port_is_taken_until_it_is_free():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert not can_listen("127.0.0.1", port)
        with pytest.raises(PortTakenError, match=f"Port {port} on 127.0.0.1 is taken; .* another --port"):
            require_free("127.0.0.1", port, "--port")
    assert can_listen("127.0.0.1", port)
    require_free("127.0.0.1", port, "--port")


def test_an_address_that_is_not_ours_is_no_taken_port():
    with pytest.raises(ConfigError, match="no address of this machine") as refused:
        require_free("192.0.2.1", 0, "--port")
    assert not isinstance(refused.value, PortTakenError)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "from 1024 on"), (errno.EADDRNOTAVAIL, "no address"), (errno.EMFILE, "Too many open files")],
)
def test_every_refusal_says_which(number, words):
    said = refusal(OSError(number, "Too many open files"), "h", 80)
    assert words in str(said)
    assert type(said) is ConfigError


def test_a_name_that_nobody_knows_is_no_address():
    assert "no address" in str(refusal(socket.gaierror(-2, "Name or service not known"), "h", 80))
