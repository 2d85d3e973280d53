"""Matrix products on CPU with weights in oneDNN's own order: about twice as fast as torch's at few rows.

A weight is reordered once after loading and the original let go of, so that memory does not double.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from cluster.engine.model import agreement, kernels

# The order of a weight depends on the rows that it is made for; made for these it was the fastest, or as fast as
# any, from 1 to 2048 rows (ops/bench/kernels).
_ROWS = 64
_PANEL = 64  # columns that lie side by side in a weight of float32, where the processor has AVX-512
MOST_ROWS = 64  # up to here our own product is used
MANY_ROWS = 24  # enough for its other branch: from 19 on it fetches what comes next meanwhile
# A weight that other code reads is kept in plain order, too, if it is no larger: routers of experts are small.
_KEPT_BYTES = 64 << 20
# Some columns of a weight are kept a second time up to here: a model of larger ones has many layers beside this one.
_COPY_BYTES = 32 << 20
_PROVEN_WITH_MANY: set[tuple[object, ...]] = set()
Reduce = Callable[[torch.Tensor], object]  # sums in place


def available(dtype: torch.dtype) -> bool:
    """Whether weights of ``dtype`` can be reordered here: torch refuses bfloat16 where the processor lacks support."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


class PackedWeight(torch.Tensor):
    """The weight of a Linear that is stored in another order, for whoever looks at it from outside.

    Some families ask for its type (Hunyuan's router), others multiply with it themselves (LongCat's). Shape, type and
    device are told as they were; whatever needs the numbers gets a copy of them in plain order, made by ``read``.
    """

    _read: Callable[[], torch.Tensor]
    _numbers: torch.Tensor | None

    @staticmethod
    def __new__(
        cls: type[PackedWeight], shape: tuple[int, int], dtype: torch.dtype, read: Callable[[], torch.Tensor]
    ) -> PackedWeight:
        made: PackedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # noqa: SLF001
        made._read, made._numbers = read, None
        return made

    def numbers(self) -> torch.Tensor:
        """``[out, in]``; not to be written to."""
        numbers = self._numbers
        if numbers is None:
            numbers = self._read()
            if numbers.nbytes <= _KEPT_BYTES:
                self._numbers = numbers
        return numbers

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = tree_map_only(PackedWeight, PackedWeight.numbers, (tuple(args), kwargs or {}))
        return func(*plain[0], **plain[1])


class Product(nn.Module):
    """``x @ weight.T + bias`` of ``[..., in]``, ``weight`` ``[out, in]``.

    ``reduce`` sums the product over the ranks of a group, in place and before the bias is added.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, reduce: Reduce | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)  # noqa: SLF001
        self.weight = PackedWeight((self.out_features, self.in_features), weight.dtype, self.packed.to_dense)
        self.bias = None if bias is None else bias.detach()
        self.reduce = reduce
        self._multiply = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001 - the overload: quicker to call
        self._inner_bias = self.bias if reduce is None else None
        self._few = _few_rows(self.packed, weight, self._inner_bias)

    def columns_from(self, first: int) -> Product | None:
        """A product of only the columns from ``first`` on, with a copy of their weights; None where that is large."""
        if (
            self.reduce is not None
            or (self.out_features - first) * self.in_features * self.weight.itemsize > _COPY_BYTES
        ):
            return None
        return Product(self.packed.to_dense()[first:], None if self.bias is None else self.bias[first:])

    @property
    def whole_few_rows(self) -> FewRows | None:
        """How up to ``MOST_ROWS`` rows are multiplied; None where others do it, or where ranks sum it up."""
        return self._few if self.reduce is None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = self._few
        # Whatever is not as it should be goes to oneDNN, which looks and says so.
        if (
            few is not None
            and x.numel() <= few.most
            and x.dtype is torch.float32
            and x.shape[-1] == self.in_features
            and x.is_contiguous()
        ):
            out = few.multiply(x, few.address, few.packed_in, few.bias, self.out_features)
        else:
            out = self._multiply(x, self.packed, self._inner_bias, "none", [], "")
        if self.reduce is not None:
            self.reduce(out)
            if self.bias is not None:
                out += self.bias
        return out


@dataclass(frozen=True, slots=True)
class FewRows:
    """Our product for few rows, from oneDNN's own memory: a call of oneDNN's has fixed costs that few rows feel."""

    multiply: Callable[..., torch.Tensor]
    bias: torch.Tensor | None
    address: int
    packed_in: int
    most: int  # numbers of an input


def _few_rows(packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> FewRows | None:
    """Where ``packed`` is laid out as our kernel reads it, which is tried out.

    Where a weight's numbers lie shows with any rows; many are tried once for each shape.
    """
    library, ops = kernels.load(), torch.ops.mkldnn
    if library is None or weight.dtype != torch.float32 or not hasattr(ops, "data_ptr") or not hasattr(ops, "_nbytes"):
        return None
    columns, width = weight.shape
    packed_in, rest = divmod(ops._nbytes(packed), -(-columns // _PANEL) * _PANEL * weight.itemsize)  # noqa: SLF001
    if rest or packed_in < width:
        return None
    few = FewRows(library.packed_product, bias, ops.data_ptr(packed), packed_in, MOST_ROWS * width)
    shape = (few.multiply, columns, width, packed_in, bias is None)
    for rows in (agreement.ROWS,) if shape in _PROVEN_WITH_MANY else (agreement.ROWS, MANY_ROWS):
        x = agreement.random(rows, width, dtype=weight.dtype)
        mine = few.multiply(x, few.address, packed_in, bias, columns)
        if not agreement.agree(mine, ops._linear_pointwise(x, packed, bias, "none", [], "")):  # noqa: SLF001
            return None
    _PROVEN_WITH_MANY.add(shape)
    return few


class _Shared:
    """One product for several Linears that are called with the same tensor, one after the other."""

    def __init__(self, product: Product, widths: Sequence[int]) -> None:
        self.product, self.widths = product, list(widths)
        self._x: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        kept = self._parts[index] if self._x is x else None
        if kept is None:
            self._x, self._parts = x, list(self.product(x).split(self.widths, dim=-1))
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
        self.shared, self.index = shared, index
        whole, first = shared.product.weight, sum(shared.widths[:index])
        self.weight = PackedWeight(
            (out_features, in_features), whole.dtype, lambda: whole.numbers()[first : first + out_features]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.part(self.index, x)


def merged_bias(
    widths: Sequence[int], biases: Sequence[torch.Tensor | None], like: torch.Tensor
) -> torch.Tensor | None:  # fmt: skip
    """The bias of several Linears side by side, zeros for one that has none; None where none has."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [like.new_zeros(width) if bias is None else bias.detach() for width, bias in zip(widths, biases, strict=True)]
    )


def whole(modules: Sequence[object]) -> Product | None:
    """The product that ``modules`` are all the parts of, in order; None when they are something else."""
    found = [module for module in modules if isinstance(module, Part)]
    if len(found) < len(modules) or len({id(part.shared) for part in found}) != 1:
        return None
    shared = found[0].shared
    in_order = [part.index for part in found] == list(range(len(shared.widths)))
    return shared.product if in_order else None


def parts(product: Product, widths: Sequence[int]) -> list[Part]:
    """Stand-ins for the Linears that ``product`` was merged from."""
    shared = _Shared(product, widths)
    return [Part(shared, index, product.in_features, width) for index, width in enumerate(widths)]
