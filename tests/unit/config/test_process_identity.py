"""Processes are told apart by when they started, whatever happens to the machine's clock."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import psutil
import pytest
from psutil import _pslinux

from cluster.config import process_identity
from cluster.config.process_identity import find_process, outlive, started_s


def set_clock(monkeypatch, booted: float) -> None:
    """As when somebody sets it: the machine seems to have started at another time."""
    monkeypatch.setattr(_pslinux, "boot_time", lambda: booted)


def test_a_process_is_found_again_though_the_clock_was_set(monkeypatch):
    started = started_s(psutil.Process())
    set_clock(monkeypatch, psutil.boot_time() - 3600)
    found = find_process(os.getpid(), started)
    assert found is not None
    assert found.pid == os.getpid()


def test_who_has_its_id_now_is_another_process():
    assert find_process(os.getpid(), started_s(psutil.Process()) - 0.01) is None


def test_an_ended_process_is_none_reaped_or_not():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = started_s(psutil.Process(child.pid))
        assert find_process(child.pid, started) is not None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
        assert find_process(child.pid, started) is None
    assert find_process(child.pid, started) is None


@pytest.fixture(params=["pidfd", "polling"])
def way(request, monkeypatch):
    """As on Linux, and as where a descriptor of a process cannot be had."""
    if request.param == "polling":

        def refused(_process):
            raise OSError(errno.ENOSYS, "no pidfd_open here")

        monkeypatch.setattr(process_identity, "_descriptor", refused)


def test_only_what_has_not_ended_by_the_deadline_outlives_it(way):
    waits = [sys.executable, "-S", "-c", "input()"]
    with (
        subprocess.Popen(waits, stdin=subprocess.PIPE) as one,
        subprocess.Popen(waits, stdin=subprocess.PIPE) as other,
    ):
        first, second = psutil.Process(one.pid), psutil.Process(other.pid)
        assert set(outlive([first, second], 0.05)) == {first, second}
        one.kill()
        assert outlive([first, second], 0.5) == [second]
        other.kill()
        assert outlive([first, second], 30) == []
    assert outlive([first, second], 30) == []


def test_nobody_waits_for_a_parent_that_takes_no_notice():
    """As in a container whose process 1 is no init: what ends there stays a zombie."""
    program = f"import subprocess, sys, time; print(subprocess.Popen([{sys.executable!r}, '-S', '-c', 'input()'], stdin=subprocess.PIPE).pid, flush=True); time.sleep(600)"
    command = [sys.executable, "-S", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as careless:
        child = psutil.Process(int(careless.stdout.readline()))
        child.kill()
        assert outlive([child], 120) == []
        assert child.status() == psutil.STATUS_ZOMBIE
        careless.kill()
