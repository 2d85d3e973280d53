"""Matrix products on CPU with weights in oneDNN's own order: about twice as fast as torch's at few rows.

A weight is reordered once after loading and the original let go of, so that memory does not double.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

# The order of a weight depends on the rows that it is made for; made for these it was the fastest, or as fast as
# any, from 1 to 2048 rows (ops/bench/kernels).
_ROWS = 64
Reduce = Callable[[torch.Tensor], None]


def available(dtype: torch.dtype) -> bool:
    """Whether weights of ``dtype`` can be reordered here: torch refuses bfloat16 where the processor lacks support."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


class Product(nn.Module):
    """``x @ weight.T + bias`` of ``[..., in]``, ``weight`` ``[out, in]``.

    ``reduce`` sums the product over the ranks of a group, in place and before the bias is added.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, reduce: Reduce | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Some families look at the type of a Linear's weight (Hunyuan's router); its numbers are in ``packed`` alone.
        self.weight = torch.empty_like(weight, device="meta", requires_grad=False)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)  # noqa: SLF001
        self.bias = None if bias is None else bias.detach()
        self.reduce = reduce
        self._inner_bias = self.bias if reduce is None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self._inner_bias, "none", [], "")  # noqa: SLF001
        if self.reduce is not None:
            self.reduce(out)
            if self.bias is not None:
                out += self.bias
        return out


class _Shared:
    """One product for several Linears that are called with the same tensor, one after the other."""

    def __init__(self, product: Product, widths: Sequence[int]) -> None:
        self._product, self._widths = product, list(widths)
        self._x: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        kept = self._parts[index] if self._x is x else None
        if kept is None:
            self._x, self._parts = x, list(self._product(x).split(self._widths, dim=-1))
            kept = self._parts[index]
            assert kept is not None
        self._parts[index] = None
        if all(part is None for part in self._parts):
            self._x = None
        return kept


class Part(nn.Module):
    """Stands for one Linear of a merged product; what it returns is a view of the whole."""

    def __init__(self, shared: _Shared, index: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._shared, self._index = shared, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._shared.part(self._index, x)


def merged_bias(
    widths: Sequence[int], biases: Sequence[torch.Tensor | None], like: torch.Tensor
) -> torch.Tensor | None:  # fmt: skip
    """The bias of several Linears side by side, zeros for one that has none; None where none has."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [like.new_zeros(width) if bias is None else bias.detach() for width, bias in zip(widths, biases, strict=True)]
    )


def parts(product: Product, widths: Sequence[int]) -> list[Part]:
    """Stand-ins for the Linears that ``product`` was merged from."""
    shared = _Shared(product, widths)
    return [Part(shared, index, product.in_features, width) for index, width in enumerate(widths)]
