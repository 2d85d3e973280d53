"""What ``drain`` and ``scale`` ask of the controller, and what they refuse."""

from __future__ import annotations

import pytest

from cluster.cli import operate
from cluster.client.control import ControllerUnreachable
from cluster.client.local_cluster import LocalCluster, remember
from cluster.domain.clock import ManualClock
from cluster.domain.errors import ConfigError


class Control:
    """Every client made; remembers what was asked."""

    def __init__(self, away: int = 0) -> None:
        self.asked: list[tuple] = []
        self.away = away

    def __call__(self, address: str) -> Control:
        self.asked.append(("at", address))
        return self

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def scale(self, model: str, replicas: int) -> None:
        self.asked.append(("scale", model, replicas))

    def drain(self, replica: str, deadline_s: float) -> None:
        self.asked.append(("drain", replica, deadline_s))

    def drain_node(self, node: str, deadline_s: float) -> None:
        if self.away:
            self.away -= 1
            raise ControllerUnreachable("nobody")
        self.asked.append(("drain_node", node, deadline_s))


class Pause:
    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)


@pytest.fixture
def control(monkeypatch) -> Control:
    made = Control()
    monkeypatch.setattr(operate, "ControlClient", made)
    return made


def test_a_replica_or_a_node(control, capsys):
    operate.drain_command("m/0", None, 5.0, "c:1", None)
    operate.drain_command(None, "10.0.0.2", 7.0, "c:1", None)
    assert control.asked == [("at", "c:1"), ("drain", "m/0", 5.0), ("at", "c:1"), ("drain_node", "10.0.0.2", 7.0)]
    assert "10.0.0.2 is empty" in capsys.readouterr().out


@pytest.mark.parametrize(("replica", "node"), [(None, None), ("m/0", "10.0.0.2")])
def test_exactly_one_of_them(control, replica, node):
    with pytest.raises(ConfigError, match="either a replica"):
        operate.drain_command(replica, node, 5.0, "c:1", None)
    assert control.asked == []


def test_a_local_cluster_is_found_by_its_run_directory(control, tmp_path):
    with pytest.raises(ConfigError, match="No cluster runs"):
        operate.scale_command("m", 2, None, tmp_path)
    remember(tmp_path, LocalCluster("c", (20000, 23999), "127.0.0.1:7", "127.0.0.1:2", 1, 0.0, "127.0.0.1:3", True))
    operate.scale_command("m", 2, None, tmp_path)
    assert control.asked == [("at", "127.0.0.1:7"), ("scale", "m", 2)]


def test_a_controller_that_is_being_started_again_is_waited_for():
    clock, control = ManualClock(), Control(away=3)
    operate.patiently(lambda left_s: control.drain_node("n", left_s), 10.0, clock, Pause(clock))
    assert control.asked == [("drain_node", "n", 10.0 - 3 * operate.RETRY_S)]


def test_but_not_for_ever():
    clock, control = ManualClock(), Control(away=10_000)
    with pytest.raises(ControllerUnreachable):
        operate.patiently(lambda left_s: control.drain_node("n", left_s), 600.0, clock, Pause(clock))
    assert clock.now() == operate.CONTROLLER_AWAY_S


def test_one_that_dies_under_a_long_drain_is_waited_for_and_what_is_left_counts():
    clock, asked = ManualClock(), []

    def drain(left_s: float) -> None:
        asked.append(left_s)
        if len(asked) < 3:
            clock.advance(100.0)
            raise ControllerUnreachable("it died")

    operate.patiently(drain, 150.0, clock, Pause(clock))
    assert asked == [150.0, 49.0, 0.0]
