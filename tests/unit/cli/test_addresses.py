"""Addresses that were given on the command line."""

import pytest

from cluster.cli.addresses import control_address, parse_addresses
from cluster.cli.processes import router_command, worker_command
from cluster.domain.errors import ConfigError


def test_routers_come_one_by_one_or_separated_by_commas():
    assert parse_addresses("a:1") == ["a:1"]
    assert parse_addresses(" a:1, [::1]:2,") == ["a:1", "[::1]:2"]


@pytest.mark.parametrize("text", ["nonsense", ":1", "a:", "a:b", "a:65536", "a:1,b", "", ","])
def test_what_is_no_address_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"HOST:PORT, for example 127\.0\.0\.1:50051"):
        parse_addresses(text)


def test_a_controller_that_is_no_address_is_refused_before_anything_starts(tmp_path):
    for start in (
        lambda: control_address("nonsense", tmp_path),
        lambda: router_command("nonsense", run_dir=tmp_path),
        lambda: worker_command("127.0.0.1:1", controller="nonsense", run_dir=tmp_path),
    ):
        with pytest.raises(ConfigError, match=r"'nonsense' is no address.*127\.0\.0\.1:50052"):
            start()
    assert not list(tmp_path.iterdir())
    assert control_address("10.0.0.1:7", None) == "10.0.0.1:7"
