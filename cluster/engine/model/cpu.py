"""A loaded model made fast on a CPU: products with reordered weights, and fused operations in their place.

Modules are recognised by their structure. Every replacement is computed beside the original, on this very module with
random input, large and small, and is used only where both agree to the last bits; whatever is not known or does not
agree stays.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.engine.model import agreement, cpu_layers, kernels, products, rotary_tables
from cluster.engine.model.tensor_parallel import TensorParallelGroup

_SPARE_BYTES = 64 << 20
_EVERY_TYPE = 2  # DeepSpeed's name for an instruction set that sums float32, bfloat16 and float16
_MERGED = (("q_proj", "k_proj", "v_proj"),)
_MLPS = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("gate_up_proj", "down_proj", "activation_fn"))
Forward = Callable[..., torch.Tensor]


@dataclass(slots=True)
class Replaced:
    """How many modules got something faster, for the log."""

    products: int = 0
    merged: int = 0
    mlps: int = 0
    norms: int = 0
    rotary: int = 0
    tables: int = 0
    layers: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, name)} {name}" for name in self.__slots__)


@torch.inference_mode()
def prepare(model: nn.Module, group: TensorParallelGroup) -> Replaced:
    """Replaces what can be done faster in ``model``, which is loaded and on the CPU.

    Every rank of ``group`` calls it at the same time: row-parallel products are tried out with their all-reduce.
    Afterwards the replaced Linears have no ``weight``; parameters are no longer listed by their names.
    """
    done, room, vote = Replaced(), _room(model), unanimous(group)
    dtype = next(model.parameters()).dtype
    done.tables = sum(rotary_tables.replace(module, dtype) for module in list(model.modules()))
    if kernels.load() is not None:
        done.norms = sum(_replace_norm(module) for module in list(model.modules()))
        done.rotary = sum(_replace_rotary(module) for module in _modeling_modules(model))
    for module in _parents(model):
        done.mlps += _replace_mlp(module, room, vote)
        done.merged += sum(_replace_merged(module, names, room) for names in _MERGED)
    for module in _parents(model):
        done.products += _replace_children(module, group)
    done.layers = sum(cpu_layers.replace(layer, vote) for layer in _parents(model))
    return done


def _parents(model: nn.Module) -> list[nn.Module]:
    """Modules with children. A list of all modules would keep what is replaced, and its weights, alive."""
    return [module for module in model.modules() if next(module.children(), None) is not None]


def _room(model: nn.Module) -> int:
    """How many bytes of weights may be there twice for a moment: no more than packing the largest takes anyway.

    Linears that are larger together are packed one after the other. Their products take so long that one less is no
    gain: 64 MiB are read in milliseconds.
    """
    linears = (_linear(module) for module in model.modules())
    return max((linear.weight.nbytes for linear in linears if linear is not None), default=0) + _SPARE_BYTES


def head_product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """``rows @ weight.T`` for an output head that nothing else uses; the caller lets go of ``weight``."""
    if _can_reorder(weight.dtype):
        return products.Product(weight, None)
    return lambda rows: nn.functional.linear(rows, weight)


def _can_reorder(dtype: torch.dtype) -> bool:
    return dtype in agreement.TOLERANCE and products.available(dtype)


# -------------------------------------------------------------------------------------------------------- products


@dataclass(frozen=True, slots=True)
class _Linear:
    """A Linear of any library, as a weight ``[out, in]``; ``row``: its product is summed over the group."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    row: bool = False


def _linear(module: object) -> _Linear | None:
    """What ``module`` multiplies with, or None when it is no Linear that is known here."""
    if not isinstance(module, nn.Module) or not isinstance(getattr(module, "weight", None), torch.Tensor):
        return None
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, torch.Tensor)
    if weight.dim() != 2 or weight.is_meta or not _can_reorder(weight.dtype) or cpu_layers.is_hooked(module):
        return None
    name = f"{type(module).__module__}.{type(module).__name__}"
    if type(module) is nn.Linear:
        return _Linear(weight, bias)
    if name == "transformers.pytorch_utils.Conv1D":
        return _Linear(weight.t(), bias)
    if name == "cluster.engine.model.sharding.TransposedRow":
        return _Linear(weight.t(), bias, row=True)
    if name.startswith("deepspeed.module_inject.layers."):
        if type(module).__name__ == "LinearAllreduce":
            return _Linear(weight, bias, row=True)
        if type(module).__name__ in {"LinearLayer", "fused_LinearLayer"} and not module.gather_output:
            return _Linear(weight, bias)
    return None


def _product(linear: _Linear, group: TensorParallelGroup) -> products.Product:
    return products.Product(linear.weight, linear.bias, _reduce(group) if linear.row else None)


def _reduce(group: TensorParallelGroup) -> products.Reduce | None:
    if group.size == 1:
        return None
    comm: Any = sys.modules["deepspeed.comm"]
    process_group = group.process_group
    if group.collective == "shm" and getattr(comm.comm.cdb, "shm_vector_kernel_level", 0) >= _EVERY_TYPE:
        # What the function below comes to here, without the Python around it (2 us a call, ops/bench/tensor_parallel).
        return torch.ops.deepspeed.inference_all_reduce_.default

    def reduce(tensor: torch.Tensor) -> None:
        comm.inference_all_reduce(tensor, group=process_group)

    return reduce


def unanimous(group: TensorParallelGroup) -> Callable[[bool], bool]:
    """Whether every rank of the group says yes; all of them ask at the same time."""
    reduce = _reduce(group)

    def ask(vote: bool) -> bool:  # noqa: FBT001 - a vote
        if reduce is None:
            return vote
        votes = torch.full((1,), float(vote))
        reduce(votes)
        return votes.item() == group.size

    return ask


def _replace_children(parent: nn.Module, group: TensorParallelGroup) -> int:
    """The Linears right below ``parent``, one after the other: nothing here may keep those alive that are replaced."""
    names = [name for name, _ in parent.named_children()]
    return sum(_replace_child(parent, name, group) for name in names)


def _replace_child(parent: nn.Module, name: str, group: TensorParallelGroup) -> bool:
    child = getattr(parent, name)
    linear = _linear(child)
    if linear is None:
        return False
    x = agreement.random(1, agreement.ROWS, linear.weight.shape[1], dtype=linear.weight.dtype)
    product = _product(linear, group)
    if not agreement.agree(product(x), child(x)):
        return False
    setattr(parent, name, product)
    return True


def _columns(parent: nn.Module, names: Sequence[str]) -> list[_Linear] | None:
    """The Linears ``names`` of ``parent`` if all of them are there and take the same input."""
    found = [_linear(getattr(parent, name, None)) for name in names]
    linears = [linear for linear in found if linear is not None and not linear.row]
    if len(linears) < len(names) or len({(x.weight.shape[1], x.weight.dtype) for x in linears}) > 1:
        return None
    return linears


def _merged(parent: nn.Module, names: Sequence[str]) -> products.Product:
    """One product for the Linears ``names`` of ``parent``."""
    weight, bias = _joined(parent, names)
    return products.Product(weight, bias)


def _joined(parent: nn.Module, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases side by side. The Linears' own become views of them, so that no weight is there twice."""
    linears = _columns(parent, names)
    assert linears is not None, names
    widths, biases = [len(linear.weight) for linear in linears], [linear.bias for linear in linears]
    whole = linears[0].weight.detach()
    if len(linears) > 1:
        whole = torch.cat([linear.weight.detach() for linear in linears])
        for name, linear, part in zip(names, linears, whole.split(widths), strict=True):
            child = getattr(parent, name)
            if child.weight is linear.weight:
                child.weight = nn.Parameter(part, requires_grad=False)
    return whole, products.merged_bias(widths, biases, whole)


def _bytes(linears: Sequence[_Linear]) -> int:
    return sum(linear.weight.nbytes for linear in linears)


def _replace_merged(parent: nn.Module, names: Sequence[str], room: int) -> bool:
    linears = _columns(parent, names)
    if linears is None or _bytes(linears) > room:
        return False
    shapes = [linear.weight.shape for linear in linears]
    x = agreement.random(1, agreement.ROWS, shapes[0][1], dtype=linears[0].weight.dtype)
    del linears  # they would keep the weights that are let go of
    parts = products.parts(_merged(parent, names), [rows for rows, _ in shapes])
    if not all(agreement.agree(part(x), getattr(parent, name)(x)) for name, part in zip(names, parts, strict=True)):
        return False
    for name, part in zip(names, parts, strict=True):
        setattr(parent, name, part)
    return True


# ------------------------------------------------------------------------------------------------------------ MLPs


def _replace_mlp(module: nn.Module, room: int, unanimous: Callable[[bool], bool]) -> bool:
    """Gated MLPs whose parts bear the names of Llama or of Phi-3."""
    children = {name for name, _ in module.named_children()}
    names = next((names for names in _MLPS if set(names) == children), None)
    if names is None:
        return False
    *inner, down_name, act_name = names
    linears, down, act = _columns(module, inner), getattr(module, down_name), getattr(module, act_name)
    if linears is None or _linear(down) is None or len({len(linear.weight) for linear in linears}) > 1:
        return False
    # Shards differ in size. What follows sums over the group, so all ranks do it or none.
    if len(linears) > 1 and not unanimous(_bytes(linears) <= room):
        return False
    x = agreement.at_all_scales(linears[0].weight.shape[1], linears[0].weight.dtype)
    del linears  # they would keep the weights that are let go of
    library = kernels.load()
    is_silu = type(act).__name__ in {"SiLU", "SiLUActivation"}
    silu_mul = library.silu_mul if library is not None and is_silu else None
    fused = cpu_layers.FusedMLP(_merged(module, inner), down, act, silu_mul)
    if not agreement.agree_at_all_scales(fused(x), module.forward(x)):  # without hooks: they stay
        return False
    for name in (*inner, down_name):
        delattr(module, name)
    module.fused = fused
    module.forward = fused.forward
    return True


# ----------------------------------------------------------------------------------------------- norms and rotary


def _replace_norm(module: nn.Module) -> bool:
    """RMSNorms of any family: Llama's rounds before it multiplies by the weight, Gemma's adds 1 to the weight."""
    library = kernels.load()
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if library is None or "RMSNorm" not in type(module).__name__ or weight is None or not isinstance(eps, float):
        return False
    if weight.dim() != 1 or weight.is_meta or weight.dtype not in agreement.TOLERANCE or not _takes_one(module.forward):
        return False
    x, original = agreement.at_all_scales(len(weight), weight.dtype), module.forward
    expected = original(x)
    for offset, early in ((0.0, True), (1.0, False), (0.0, False), (1.0, True)):
        if agreement.agree_at_all_scales(library.rms_norm(x, weight, eps, offset, early=early), expected):
            module.forward = cpu_layers.FusedNorm(library, weight, eps, offset, original, early=early)
            return True
    return False


def _takes_one(forward: Forward) -> bool:
    return len(inspect.signature(forward).parameters) == 1


def _modeling_modules(model: nn.Module) -> Iterator[Any]:
    """The Python modules that the attention classes of ``model`` come from."""
    found = {type(module).__module__ for module in model.modules() if hasattr(module, "layer_idx")}
    for name in sorted(found):
        if hasattr(sys.modules[name], "apply_rotary_pos_emb"):
            yield sys.modules[name]


class _Rotary:
    """Stands for ``apply_rotary_pos_emb`` of a modeling module, whose attention classes look it up when they run."""

    def __init__(self, library: kernels.Kernels, original: Callable[..., Any]) -> None:
        self._library, self.original = library, original

    def __call__(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any,
                 **named: Any) -> Any:  # fmt: skip
        if more or named or not self.suits(q, k, cos, sin):
            return self.original(q, k, cos, sin, *more, **named)
        return self._library.rotate(q, k, cos, sin)

    @staticmethod
    def suits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """The packed tokens of a step, all of each head rotated, on the CPU and without gradients."""
        return (
            cos.dim() == 3
            and q.dim() == 4
            and q.shape[0] == k.shape[0] == 1
            and cos.shape == (1, q.shape[2], q.shape[3]) == (1, k.shape[2], k.shape[3])
            and sin.shape == cos.shape
            and sin.stride(1) == cos.stride(1)
            and q.stride(3) == k.stride(3) == cos.stride(2) == sin.stride(2) == 1
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.dtype in agreement.TOLERANCE
            and q.device.type == "cpu"
            and not torch.is_grad_enabled()
        )


def _replace_rotary(modeling: Any) -> bool:
    """The function itself, for the whole process: where it is used for anything but a step it is what it was."""
    library, original = kernels.load(), modeling.apply_rotary_pos_emb
    if library is None or isinstance(original, _Rotary):
        return library is not None
    mine = _Rotary(library, original)
    for dtype in agreement.TOLERANCE:
        q, k = (
            agreement.random(1, 4, agreement.ROWS, 32, dtype=dtype),
            agreement.random(1, 2, agreement.ROWS, 32, dtype=dtype),
        )
        cos, sin = agreement.random(2, 1, agreement.ROWS, 32, dtype=dtype).unbind(0)
        assert mine.suits(q, k, cos, sin), "the original would be compared with itself"
        try:
            expected = original(q, k, cos, sin)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False  # another function under this name
        if len(expected) != 2 or not all(
            agreement.agree(a, b) for a, b in zip(mine(q, k, cos, sin), expected, strict=True)
        ):
            return False
    modeling.apply_rotary_pos_emb = mine
    return True
