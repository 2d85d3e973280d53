"""Processes are told apart by when they started, whatever happens to the machine's clock."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
from psutil import _pslinux

from cluster.config.process_identity import find_process, started_s


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
