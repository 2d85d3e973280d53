"""Memory of the running process as the kernel counts it (Linux)."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def resident_bytes() -> int:
    """VmRSS now."""
    return _field("VmRSS")


def peak_resident_bytes() -> int:
    """VmHWM: the highest VmRSS since the process began or since ``reset_peak``."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Lets the peak begin anew at what is resident now; where that is forbidden the old peak stays."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return


def _field(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
