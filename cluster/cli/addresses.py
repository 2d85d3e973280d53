"""Addresses as commands take them."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.client.local_cluster import control_address_of
from cluster.config.run_dir import default_run_dir
from cluster.config.schema import ROUTER_ADDRESS
from cluster.domain.errors import ConfigError

CONTROLLER_ADDRESS = "127.0.0.1:50052"


def parse_address(text: str, example: str) -> str:
    """``text``, which is HOST:PORT; ConfigError when it is not."""
    host, separator, port = text.rpartition(":")
    if not (separator and host and port.isdecimal() and int(port) < 65536):
        raise ConfigError(f"{text!r} is no address; write it as HOST:PORT, for example {example}.")
    return text


def control_address(controller: str | None, run_dir: Path | None) -> str:
    """Of the ``controller`` that is named, else of the local cluster under ``run_dir``; ConfigError without either."""
    if controller:
        return parse_address(controller, CONTROLLER_ADDRESS)
    return control_address_of(run_dir or default_run_dir(os.environ))


def parse_addresses(text: str) -> list[str]:
    """The routers named in ``text``, separated by commas; ConfigError when one of them is no HOST:PORT."""
    addresses = [parse_address(part.strip(), ROUTER_ADDRESS) for part in text.split(",") if part.strip()]
    if not addresses:
        raise ConfigError(f"No address is given; write it as HOST:PORT, for example {ROUTER_ADDRESS}.")
    return addresses
