"""Bytes and seconds as people write them."""

from __future__ import annotations

import re

from cluster.domain.errors import ConfigError

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_UNITS = {
    "": 1, "b": 1, "kb": KB, "mb": MB, "gb": GB, "tb": TB,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "k": KIB, "m": MIB, "g": GIB, "t": TIB,
}  # fmt: skip
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes in ``text`` such as ``80GB``, ``2GiB``, ``512m`` or a plain number."""
    match = _PATTERN.fullmatch(text)
    if match is None or match.group(2).lower() not in _UNITS:
        msg = f"{text!r} is no amount of memory; write for example 80GB, 2GiB or 1073741824."
        raise ConfigError(msg)
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def format_bytes(amount: float) -> str:
    """``amount`` in decimal units with three figures: ``52.6 GB``."""
    for unit, name in ((TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB")):
        if abs(amount) >= unit:
            return f"{amount / unit:.3g} {name}" if amount < 999.5 * unit else f"{amount / unit:.0f} {name}"
    return f"{amount:.0f} B"


def format_seconds(seconds: float) -> str:
    """``seconds`` with a unit that suits them: ``1.2 ms``, ``35 s``, ``4 min``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min"
