"""What ``serve`` decides: flags, patience, when to give up."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import serve
from cluster.client.control import ControllerUnreachable
from cluster.config.load import load_config
from cluster.config.schema import ClusterConfig, ModelConfig
from cluster.domain.clock import ManualClock
from cluster.domain.errors import ConfigError, ReplicaError
from cluster.v1 import control_pb2

READY = control_pb2.ClusterStatus(
    models=[control_pb2.ModelStatus(name="m", desired_replicas=1, ready_replicas=1)],
    replicas=[control_pb2.ReplicaStatus(replica="m/0", model="m", generation=1, phase="READY")],
)


def failed(**changes) -> control_pb2.ClusterStatus:
    replica = {"replica": "m/0", "model": "m", "phase": "FAILED", "reason": "dead: rank 0", **changes}
    return control_pb2.ClusterStatus(
        models=[control_pb2.ModelStatus(name="m", desired_replicas=1)],
        replicas=[control_pb2.ReplicaStatus(**replica)],
    )


def console() -> Console:
    return Console(file=io.StringIO(), width=140)


class Interrupt:
    """Never set; every wait takes its time on the clock."""

    def __init__(self, clock: ManualClock, set_after_s: float = float("inf")) -> None:
        self.clock, self.set_after_s = clock, set_after_s

    def wait(self, seconds: float) -> bool:
        self.clock.advance(seconds)
        return self.clock.now() >= self.set_after_s


class Controller:
    def __init__(self, *answers) -> None:
        self.answers = list(answers)

    def status(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


# ---- flags ----


def test_flags_hold_for_every_model_that_is_named():
    flags = serve._model_flags(["a", "b"], {"replicas": 2, "dtype": None})
    assert flags == {"models.0.model": "a", "models.0.replicas": 2, "models.1.model": "b", "models.1.replicas": 2}


ENGINE_FLAGS = {
    "--max-num-waiting": ("max_num_waiting", 5), "--max-waiting-prompt-tokens": ("max_waiting_prompt_tokens", 99),
    "--no-enable-prefix-caching": ("enable_prefix_caching", False), "--rope-scaling": ("rope_scaling", "linear:2"),
    "--load-format": ("load_format", "dummy"), "--seed": ("seed", 7), "--block-size": ("block_size", 32),
    "--max-num-seqs": ("max_num_seqs", 3), "--kv-cache-bytes": ("kv_cache_bytes", 1000),
}  # fmt: skip


@pytest.mark.parametrize("flag", ENGINE_FLAGS)
def test_every_flag_of_the_engine_reaches_the_config(flag, monkeypatch):
    values = {}
    monkeypatch.setattr(serve, "_load_and_serve", lambda file, flags, *_: values.update(flags))
    app = typer.Typer()
    app.command()(serve.serve_command)
    name, value = ENGINE_FLAGS[flag]
    result = CliRunner().invoke(app, ["demo", flag, *([] if flag.startswith("--no-") else [str(value)])])
    assert result.exit_code == 0, result.output
    model = load_config(None, {}, values).config.models[0]
    expected = ModelConfig(model="demo", **{name: value})
    assert model == expected
    assert getattr(model, name) != getattr(ModelConfig(model="demo"), name)


def test_one_name_cannot_be_two_models():
    with pytest.raises(ConfigError, match="--config"):
        serve._model_flags(["a", "b"], {"served_model_name": "x"})


# ---- waiting ----


def test_failures_of_earlier_runs_are_not_this_ones():
    serve.raise_if_hopeless(failed(generation=40, failures_in_a_row=1))
    with pytest.raises(ReplicaError, match=r"m/0 failed 3 times in a row: dead: rank 0"):
        serve.raise_if_hopeless(failed(generation=41, failures_in_a_row=3))


def test_one_bad_replica_of_a_model_that_serves_is_no_reason_to_end():
    status = failed(failures_in_a_row=9)
    status.models[0].ready_replicas = 1
    assert serve.raise_if_hopeless(status) is None


def test_a_controller_that_is_away_for_a_while_is_waited_for():
    clock, away = ManualClock(), ControllerUnreachable("nobody")
    control = Controller(*[away] * 100, READY)
    serve.wait_until_ready(control, console(), Interrupt(clock), clock)
    assert clock.now() == pytest.approx(30)


def test_but_not_for_ever():
    clock = ManualClock()
    with pytest.raises(ControllerUnreachable):
        serve.wait_until_ready(Controller(ControllerUnreachable("nobody")), console(), Interrupt(clock), clock)
    assert serve.CONTROLLER_AWAY_S < clock.now() < serve.CONTROLLER_AWAY_S + 1


def test_ctrl_c_ends_the_wait():
    clock = ManualClock()
    with pytest.raises(KeyboardInterrupt):
        serve.wait_until_ready(Controller(failed()), console(), Interrupt(clock, 5.0), clock)


# ---- supervising ----


def test_pauses_before_another_router_double_and_are_bounded():
    pauses = [serve.router_pause_s(deaths) for deaths in range(1, 10)]
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert serve.router_pause_s(10**6) == 30


@pytest.fixture
def routers(monkeypatch):
    """A cluster whose router is always dead; the starts that were tried."""
    starts: list[float] = []
    monkeypatch.setattr(serve, "load_local", lambda _: SimpleNamespace(stopping=False))
    monkeypatch.setattr(serve, "router_is_alive", lambda _: False)
    return starts


def test_a_router_that_dies_again_and_again_is_given_up(routers, monkeypatch, tmp_path):
    clock = ManualClock()
    monkeypatch.setattr(serve, "restart_router", lambda *_: routers.append(clock.now()))
    with pytest.raises(ReplicaError, match="died 11 times in a row"):
        serve._supervise(ClusterConfig(), tmp_path, Interrupt(clock), console(), clock)
    assert len(routers) == serve.ROUTER_DEATHS_TOLERATED


def test_a_router_that_cannot_be_started_is_tried_again(routers, monkeypatch, tmp_path):
    clock = ManualClock()

    def refuse(*_):
        routers.append(clock.now())
        raise ReplicaError("port taken")

    monkeypatch.setattr(serve, "restart_router", refuse)
    said = console()
    serve._supervise(ClusterConfig(), tmp_path, Interrupt(clock, 20.0), said, clock)
    assert routers == [1, 3, 6, 11]
    assert "port taken" in said.file.getvalue()


def test_a_router_that_somebody_is_ending_is_not_started_again(routers, monkeypatch, tmp_path):
    clock = ManualClock()
    monkeypatch.setattr(serve, "load_local", lambda _: SimpleNamespace(stopping=True) if clock.now() < 5.5 else None)
    monkeypatch.setattr(serve, "restart_router", lambda *_: routers.append(clock.now()))
    serve._supervise(ClusterConfig(), tmp_path, Interrupt(clock), console(), clock)
    assert not routers
    assert clock.now() == 6.0, "it waits until whoever stops it has done so"


def test_somebody_else_may_stop_it(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "load_local", lambda _: None)
    clock = ManualClock()
    serve._supervise(ClusterConfig(), tmp_path, Interrupt(clock), console(), clock)
    assert clock.now() == serve.SUPERVISE_POLL_S


def test_the_second_ctrl_c_is_at_once():
    import os
    import signal

    with serve.interruptions() as interrupted:
        assert isinstance(interrupted, threading.Event)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
