"""Can this machine listen on an address? One probe for everybody who asks, and one sentence for each answer."""

from __future__ import annotations

import errno
import socket

from cluster.domain.errors import ConfigError, PortTakenError


def listening_problem(host: str, port: int) -> OSError | None:
    """Why nobody could listen on ``host:port`` now; None when somebody could."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As a server binds: a port in TIME_WAIT can be taken, one that is listened on cannot.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error
    return None


def can_listen(host: str, port: int) -> bool:
    return listening_problem(host, port) is None


def require_free(host: str, port: int, what: str) -> None:
    """Raises ``refusal`` when nobody could listen on ``host:port``; ``what`` names the setting that moves us away."""
    problem = listening_problem(host, port)
    if problem is not None:
        raise refusal(problem, host, port, what) from problem


def reserve_port(host: str, port: int) -> socket.socket:
    """A port (0: any) for several processes of this user, which share it by SO_REUSEPORT for as long as this is open.

    The socket does not listen itself: connections go to those that do. Raises ``refusal``, PortTakenError when
    somebody listens there already.
    """
    if port:
        require_free(host, port, "port")
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        raise refusal(error, host, port) from error
    return reserved


def refusal(problem: OSError, host: str, port: int, what: str = "port") -> ConfigError:
    """PortTakenError when somebody listens there, else a ConfigError that says what is wrong with the address."""
    if problem.errno == errno.EADDRINUSE:
        return PortTakenError(f"Port {port} on {host} is taken; stop who listens there, or choose another {what}.")
    if problem.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(f"Port {port} on {host} is not for this user; choose another {what}, from 1024 on.")
    if isinstance(problem, socket.gaierror) or problem.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return ConfigError(f"{host} is no address of this machine; choose another host than {host!r} to listen on.")
    return ConfigError(f"Nobody can listen on {host}:{port}: {problem.strerror or problem}; choose another {what}.")
