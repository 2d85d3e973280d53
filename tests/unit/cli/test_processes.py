"""The head's foreground: it follows its config, watches Ray's processes, and ends when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.cli import processes
from cluster.domain.errors import ConfigError, ReplicaError

FOLDER = Path("/nowhere")


@pytest.fixture
def beside(monkeypatch) -> Iterator[ThreadPoolExecutor]:
    monkeypatch.setattr(processes, "CONFIG_POLL_S", 0.01)
    monkeypatch.setattr(processes, "head_is_alive", lambda _: True)
    with ThreadPoolExecutor(1) as made:
        yield made


def test_it_steps_until_it_is_told_to_end(beside):
    interrupted, steps = threading.Event(), []

    def step() -> None:
        steps.append(threading.current_thread())
        if len(steps) == 3:
            interrupted.set()

    processes.supervise(FOLDER, step, beside, interrupted)
    assert len(steps) == 3
    assert threading.current_thread() not in steps


def test_who_ends_it_does_not_wait_for_a_model_that_is_being_planned(beside):
    interrupted, planned = threading.Event(), threading.Event()

    def step() -> None:
        interrupted.set()
        assert planned.wait(30)

    processes.supervise(FOLDER, step, beside, interrupted)
    assert not planned.is_set()
    planned.set()


def test_models_that_are_refused_end_it(beside):
    def step() -> None:
        raise ConfigError("no such directory")

    with pytest.raises(ConfigError, match="no such directory"):
        processes.supervise(FOLDER, step, beside, threading.Event())


def test_a_head_that_died_ends_it(beside, monkeypatch):
    monkeypatch.setattr(processes, "head_is_alive", lambda _: False)
    with pytest.raises(ReplicaError, match="Ray head has ended"):
        processes.supervise(FOLDER, lambda: None, beside, threading.Event())
