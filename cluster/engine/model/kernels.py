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
_VERSION = 5  # of the functions below; kernels.cpp says the same
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_int, _ptr = ctypes.c_int64, ctypes.c_void_p


class AttentionCall(ctypes.Structure):
    """``struct Attention`` of kernels.cpp."""

    _fields_ = (
        *((name, _ptr) for name in ("query", "key", "value", "out", "key_pool", "value_pool", "tables", "sequences",
                                    "kv_slots", "sinks", "slopes", "bias", "cosine", "sine")),
        *((name, _int) for name in ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head",
                                    "angle_token", "tokens", "heads", "kv_heads", "key_dim", "value_dim",
                                    "block_size", "table_width", "num_sequences", "window", "bias_width", "threads")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    )  # fmt: skip


class LinearCall(ctypes.Structure):
    """``struct Linear`` of kernels.cpp."""

    _fields_ = (("weight", _ptr), ("bias", _ptr), ("packed_in", _int), ("columns", _int), ("width", _int))


class LayerCall(ctypes.Structure):
    """``struct Layer`` of kernels.cpp."""

    _fields_ = (
        ("attention", _ptr),
        *((name, LinearCall) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _ptr) for name in ("input_norm", "post_norm")),
        *((name, ctypes.c_float) for name in ("input_eps", "input_offset", "post_eps", "post_offset")),
    )


class Kernels:
    """The functions of one loaded library. All tensors lie on the CPU with unit stride in the last dimension."""

    def __init__(self, path: Path) -> None:
        # Attention can take long, so it lets go of the interpreter; the others are shorter than doing so.
        long, short = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        if long.llm_cluster_kernels_version() != _VERSION:
            raise OSError(f"{path} is of another version of llm-cluster")
        self.attention = {t: _function(long, f"attention_{s}", _ptr) for t, s in _SUFFIX.items()}
        self.store = {t: _function(long, f"store_{s}", _ptr) for t, s in _SUFFIX.items()}
        self.layer = _function(long, "layer_f32", _ptr, _ptr, _ptr, _int, _int)
        self._packed_product = _function(
            long, "packed_product_f32", _ptr, _int, _ptr, _int, _ptr, _ptr, _int, _int, _int, _int
        )
        norm = (_int, _int, ctypes.c_float, ctypes.c_float, _int, _int)
        self._rms_norm = {
            t: _function(short, f"rms_norm_{s}", _ptr, _int, _ptr, _ptr, *norm) for t, s in _SUFFIX.items()
        }
        self._add_rms_norm = {
            t: _function(short, f"add_rms_norm_{s}", _ptr, _int, _ptr, _int, _ptr, _ptr, _ptr, *norm)
            for t, s in _SUFFIX.items()
        }
        self._silu_mul = {
            t: _function(short, f"silu_mul_{s}", _ptr, _ptr, _ptr, _int, _int, _int, _int) for t, s in _SUFFIX.items()
        }
        heads = (_ptr, _int, _int, _ptr, _int)
        self._rotate = {
            t: _function(short, f"rotate_{s}", *heads, *heads, _ptr, _ptr, _int, _int, _int, _int)
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

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
        *,
        early: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``residual + x``, rounded to the dtype, and its ``rms_norm``; both new and contiguous.

        Both inputs have the same shape, ``[..., rows, width]``, and all dimensions before the rows are 1.
        """
        width, rows = x.shape[-1], x.shape[-2]
        assert rows * width == x.numel() == residual.numel(), (x.shape, residual.shape)
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        out = torch.empty_like(total)
        self._add_rms_norm[x.dtype](
            x.data_ptr(), x.stride(-2), residual.data_ptr(), residual.stride(-2), weight.data_ptr(), total.data_ptr(),
            out.data_ptr(), rows, width, eps, offset, early, torch.get_num_threads(),
        )  # fmt: skip
        return total, out

    def packed_product(
        self, x: torch.Tensor, weight: int, packed_in: int, bias: torch.Tensor | None, columns: int
    ) -> torch.Tensor:
        """``x @ weight.T + bias`` of ``[..., in]``, contiguous and float32; ``[..., columns]``.

        ``weight`` is the address of ``[ceil(columns / 64), packed_in, 64]`` numbers: panels of 64 columns, side by
        side for each of the inputs.
        """
        width = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], columns)
        self._packed_product(
            x.data_ptr(), width, weight, packed_in, None if bias is None else bias.data_ptr(), out.data_ptr(),
            x.numel() // width, columns, width, torch.get_num_threads(),
        )  # fmt: skip
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

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``rotate_pair`` of ``[1, heads, tokens, dim]`` and ``[1, kv_heads, tokens, dim]``, as transformers has them.

        The results are views of ``[tokens, heads, dim]``.
        """
        (_, heads, tokens, dim), (_, kv_heads, _, _) = q.shape, k.shape
        (_, q_head, q_token, _), (_, k_head, k_token, _) = q.stride(), k.stride()
        q_out, k_out = q.new_empty(tokens, heads, dim), k.new_empty(tokens, kv_heads, dim)
        self._rotate[q.dtype](
            q.data_ptr(), q_token, q_head, q_out.data_ptr(), heads, k.data_ptr(), k_token, k_head, k_out.data_ptr(),
            kv_heads, cos.data_ptr(), sin.data_ptr(), cos.stride(1), tokens, dim, torch.get_num_threads(),
        )  # fmt: skip
        return q_out.transpose(0, 1).unsqueeze(0), k_out.transpose(0, 1).unsqueeze(0)

    def rotate_pair(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x cos + rotate_half(x) sin`` of ``[tokens, heads, dim]`` and ``[tokens, kv_heads, dim]``, any strides.

        ``cos`` and ``sin``: ``[..., tokens, dim]``, of the same strides. Both results are contiguous, as attention
        kernels take them.
        """
        (tokens, heads, dim), (_, kv_heads, _) = q.shape, k.shape
        (q_token, q_head, _), (k_token, k_head, _) = q.stride(), k.stride()
        q_out, k_out = q.new_empty(tokens, heads, dim), k.new_empty(tokens, kv_heads, dim)
        self._rotate[q.dtype](
            q.data_ptr(), q_token, q_head, q_out.data_ptr(), heads, k.data_ptr(), k_token, k_head, k_out.data_ptr(),
            kv_heads, cos.data_ptr(), sin.data_ptr(), cos.stride(-2), tokens, dim, torch.get_num_threads(),
        )  # fmt: skip
        return q_out, k_out


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
