"""A decoder layer of few rows as one call of the compiled kernels, without the Python between its parts.

At a few rows that Python is worth seeing beside the arithmetic, and it wants the interpreter back several times a
layer, for which the thread that publishes tokens has to make room each time.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from cluster.engine.model import kernels, products
from cluster.engine.model.block_tables import StepLayout
from cluster.engine.model.native_attention import MergedAttention

# Up to here. Weights are read once for each 64 rows; with more of them oneDNN's one reading is as good.
MOST_ROWS = 2 * products.MOST_ROWS


@dataclass(frozen=True, slots=True)
class NormWeights:
    """``(weight + offset) * x / rms(x)``, ``weight`` ``[width]``."""

    weight: torch.Tensor
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class LayerParts:
    """norm, ``qkv``, attention, ``o``, add, norm, ``gate_up`` (gate first), SiLU of gate times up, ``down``, add."""

    input_norm: NormWeights
    qkv: products.Product
    o: products.Product
    post_norm: NormWeights
    gate_up: products.Product
    down: products.Product

    @property
    def shapes(self) -> tuple[tuple[int, int, bool], ...]:
        """Inputs and outputs of each product, and whether it has a bias."""
        linears = (self.qkv, self.o, self.gate_up, self.down)
        return tuple((linear.in_features, linear.out_features, linear.bias is not None) for linear in linears)


class WholeLayer:
    """Steps of up to ``MOST_ROWS`` tokens; float32."""

    def __init__(self, library: kernels.Kernels, parts: LayerParts, attention: MergedAttention) -> None:
        """``parts`` that ``fits``."""
        self._parts, self._attention, self._layer = parts, attention, library.layer  # the library has their addresses
        self._call = kernels.LayerCall(
            qkv=_linear(parts.qkv), o=_linear(parts.o), gate_up=_linear(parts.gate_up), down=_linear(parts.down),
            input_norm=parts.input_norm.weight.data_ptr(), input_eps=parts.input_norm.eps,
            input_offset=parts.input_norm.offset, post_norm=parts.post_norm.weight.data_ptr(),
            post_eps=parts.post_norm.eps, post_offset=parts.post_norm.offset,
        )  # fmt: skip
        self._where = ctypes.byref(self._call)

    def __call__(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        """The layer's result, new, of ``hidden`` ``[1, tokens, width]``; ``cos``, ``sin`` ``[1, tokens, key_dim]``."""
        if not hidden.is_contiguous():
            hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        self._call.attention = self._attention.begin(cos, sin, layout)
        self._layer(self._where, hidden.data_ptr(), out.data_ptr(), hidden.shape[1], torch.get_num_threads())
        return out


def fits(parts: LayerParts, attention: MergedAttention) -> bool:
    """Whether every product is ours for few rows, whole on this rank, and as wide as the next one needs it."""
    qkv, o, gate_up, down = parts.qkv, parts.o, parts.gate_up, parts.down
    width = qkv.in_features
    return (
        all(product.whole_few_rows is not None for product in (qkv, o, gate_up, down))
        and (qkv.out_features, o.in_features) == attention.widths
        and (o.out_features, gate_up.in_features, down.out_features) == (width, width, width)
        and gate_up.out_features == 2 * down.in_features
        and all(
            norm.weight.dtype is torch.float32 and norm.weight.shape == (width,) and norm.weight.is_contiguous()
            for norm in (parts.input_norm, parts.post_norm)
        )
    )


def _linear(product: products.Product) -> kernels.LinearCall:
    few = product.whole_few_rows
    assert few is not None, "fits says so"
    bias = None if few.bias is None else few.bias.data_ptr()
    return kernels.LinearCall(few.address, bias, few.packed_in, product.out_features, product.in_features)
