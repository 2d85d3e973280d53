"""The compiled CPU kernels (kernels.cpp): loading them, and calling them with tensors.

ops/compile-cpu-kernels builds one library for each kind of processor, and a rank takes the best that its own can run.
Without any the engine works with torch's operations, slower.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch

from cluster.engine import cpu_kernels

_LOG = logging.getLogger(__name__)
_VERSION = 2  # of the functions below; kernels.cpp says the same
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_int, _ptr = ctypes.c_int64, ctypes.c_void_p


class AttentionCall(ctypes.Structure):
    """``struct Attention`` of kernels.cpp."""

    _fields_ = (
        *((name, _ptr) for name in ("query", "key", "value", "out", "key_pool", "value_pool", "tables", "sequences",
                                    "kv_slots", "sinks", "slopes", "bias")),
        *((name, _int) for name in ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head",
                                    "tokens", "heads", "kv_heads", "key_dim", "value_dim", "block_size",
                                    "table_width", "num_sequences", "window", "bias_width", "threads")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    )  # fmt: skip


class Kernels:
    """The functions of one loaded library. All tensors lie on the CPU with unit stride in the last dimension."""

    def __init__(self, path: Path) -> None:
        # Attention can take long, so it lets go of the interpreter; the others are shorter than doing so.
        long, short = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        if long.llm_cluster_kernels_version() != _VERSION:
            raise OSError(f"{path} is of another version of llm-cluster")
        self.attention = {t: _function(long, f"attention_{s}", _ptr) for t, s in _SUFFIX.items()}
        self._rms_norm = {
            t: _function(short, f"rms_norm_{s}", _ptr, _int, _ptr, _ptr, _int, _int, ctypes.c_float, ctypes.c_float,
                         _int, _int)
            for t, s in _SUFFIX.items()
        }  # fmt: skip
        self._silu_mul = {
            t: _function(short, f"silu_mul_{s}", _ptr, _ptr, _ptr, _int, _int, _int, _int) for t, s in _SUFFIX.items()
        }
        self._rotate = {
            t: _function(short, f"rotate_{s}", _ptr, _int, _int, _ptr, _ptr, _int, _ptr, _int, _int, _int, _int)
            for t, s in _SUFFIX.items()
        }

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, *, early: bool = True
    ) -> torch.Tensor:
        """``(weight + offset) * x / rms(x)`` over the last dimension; ``early``: x / rms(x) is rounded to the dtype."""
        width = x.shape[-1]
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // width
        self._rms_norm[x.dtype](
            x.data_ptr(), width, weight.data_ptr(), out.data_ptr(), rows, width, eps, offset, early, self.threads
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` of ``[..., 2 n]``, gate first, contiguous; ``[..., n]``."""
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        start = gate_up.data_ptr()
        self._silu_mul[gate_up.dtype](
            start, start + width * gate_up.itemsize, out.data_ptr(), 2 * width, out.numel() // width, width,
            self.threads,
        )  # fmt: skip
        return out

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``x cos + rotate_half(x) sin`` of ``[1, heads, tokens, dim]`` with ``[1, tokens, dim]``.

        The result is a view of ``[tokens, heads, dim]``.
        """
        _, heads, tokens, dim = x.shape
        out = torch.empty((tokens, heads, dim), dtype=x.dtype)
        self._rotate[x.dtype](
            x.data_ptr(), x.stride(2), x.stride(1), cos.data_ptr(), sin.data_ptr(), cos.stride(1), out.data_ptr(),
            tokens, heads, dim, self.threads,
        )  # fmt: skip
        return out.transpose(0, 1).unsqueeze(0)


@functools.cache
def load() -> Kernels | None:
    """The kernels, loaded once; None, said once, where they were not built."""
    path = cpu_kernels.best_file()
    if path is None:
        _LOG.warning(
            "no compiled CPU kernels in %s: slower operations of torch are used; say 'ops/setup'",
            cpu_kernels.folder(),
        )
        return None
    try:
        return Kernels(path)
    except (OSError, AttributeError) as error:
        _LOG.warning("the compiled CPU kernels do not load (%s); say 'ops/setup' to build them again", error)
        return None


def _function(library: ctypes.CDLL, name: str, *arguments: type) -> ctypes._NamedFuncPointer:
    function = library[name]
    function.argtypes, function.restype = arguments, None
    return function
