"""One rank's share of a model on meta: its parameters cut, its row-parallel layers summing over the group.

What is cut, and where, is decided by ``checkpoint.cuts`` and ``checkpoint.splits``, as in the planner's ledger. The
layers themselves are DeepSpeed's ``LinearLayer`` and ``LinearAllreduce``, given weights that are cut already: AutoTP
cannot replicate KV heads, cut fused projections by KV groups, or know experts in one tensor. Those last, and
transposed layers, sum with DeepSpeed's ``inference_all_reduce`` themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.checkpoint.cuts import LayerCuts, layer_cuts
from cluster.checkpoint.splits import (
    Cut,
    GrainCut,
    HeadCut,
    HeadOrder,
    Pieces,
    Whole,
    cut_shape,
    head_shares,
    shard_sizes,
)
from cluster.domain.errors import UnsupportedModelError
from cluster.domain.model_spec import LayerShape
from cluster.engine.model import families, probe
from cluster.engine.model.probe import AttentionLayer
from cluster.engine.model.wide_norm import wide_norm


@dataclass(frozen=True, slots=True)
class Kept:
    """What one rank keeps of a parameter: ``pieces`` of dimension ``dim``, in order; ``dim`` None: all of it.

    ``counts_once``: inside of a sum over ranks, so only the first rank reads it and the others have zeros.
    """

    dim: int | None = None
    pieces: Pieces = ()
    counts_once: bool = False


ALL = Kept()


def layer_list(model: Any) -> str:
    """The path of the decoder layers' ModuleList."""
    path: list[str] = families.attention_layers(model)[0].name.split(".")
    return ".".join(path[: next(i for i, part in enumerate(path) if part.isdigit())])


def shard_model(model: Any, rank: int, size: int, process_group: Any) -> dict[str, Kept]:
    """Cuts ``model`` (whole, on meta) down to one rank's part; tells what is kept of each parameter that is cut.

    Nothing is sent: ``process_group`` is for the forward pass. A pass on meta proves that the shapes go together.
    UnsupportedModelError, in one sentence, for a model that cannot be cut over ``size`` ranks.
    """
    kept = _cut_head(model, rank, size)
    if size == 1:
        return kept
    layers, prefix = families.attention_layers(model), layer_list(model)
    cuts = [_layer_cuts(model, f"{prefix}.{layer.layer}", layer, size) for layer in layers]
    for layer, found in zip(layers, cuts, strict=True):
        path = f"{prefix}.{layer.layer}"
        for name, cut in found.cuts.items():
            kept[f"{path}.{name}"] = _cut_parameter(model, f"{path}.{name}", cut, rank, size)
        assert found.heads is not None
        share = head_shares(*found.heads, size)[rank]
        families.localise(model.get_submodule(layer.name), share.heads, share.kv_heads)
    try:
        probe.examine(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be cut over {size} ranks ({error})") from error
    for layer, found in zip(layers, cuts, strict=True):
        path = f"{prefix}.{layer.layer}"
        _sum_over_ranks(model, path, found, process_group)
        for name in found.wide_norms:
            _spread_norm(model, f"{path}.{name}", found, name, rank, size, process_group)
    return kept


def _layer_cuts(model: Any, path: str, layer: AttentionLayer, size: int) -> LayerCuts:
    tensors = tuple((name, tuple(p.shape)) for name, p in model.get_submodule(path).named_parameters())
    shape = LayerShape(layer.heads, layer.kv_heads, 1)
    found = layer_cuts(type(model).__name__, layer.key_dim, shape, tensors)
    if found.objection or found.heads is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be cut over several ranks: {found.objection}; serve it with "
            "--tensor-parallel-size 1."
        )
    if size > found.heads[0]:
        raise UnsupportedModelError(f"{size} ranks are more than the {found.heads[0]} query heads of {path}.")
    return found


def _cut_parameter(model: Any, name: str, cut: Cut, rank: int, size: int) -> Kept:
    if isinstance(cut, Whole):
        return Kept(counts_once=cut.counts_once)
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    whole = getattr(owner, attribute)
    local = cut_shape(tuple(whole.shape), cut, size, rank)
    owner.register_parameter(
        attribute, nn.Parameter(torch.empty(local, dtype=whole.dtype, device="meta"), requires_grad=False)
    )
    _tell_width(owner, local)
    return Kept(cut.dim, cut.pieces(size)[rank])


def _tell_width(owner: nn.Module, shape: tuple[int, ...]) -> None:
    """Attributes in which layers repeat the shape of their weight."""
    if len(shape) == 2 and isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = shape
    elif len(shape) == 2 and _is_transposed(owner):
        setattr(owner, "nf", shape[1])  # noqa: B010 - Conv1D's name for it


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _cut_head(model: Any, rank: int, size: int) -> dict[str, Kept]:
    """The head keeps this rank's rows of the vocabulary; a tied one is given them by whoever loads the embedding."""
    head = model.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is head)
    rows = int(head.weight.shape[0])
    tied = head.weight is model.get_input_embeddings().weight
    cut = GrainCut(0, rows)
    kept = {f"{path}.weight": Kept(0, cut.pieces(size)[rank])}
    if hasattr(model, "keep_vocabulary"):
        model.keep_vocabulary(range(*cut.pieces(size)[rank][0]))
    if not tied and size > 1:
        kept[f"{path}.weight"] = _cut_parameter(model, f"{path}.weight", cut, rank, size)
    if getattr(head, "bias", None) is not None:
        kept[f"{path}.bias"] = _cut_parameter(model, f"{path}.bias", cut, rank, size)
    return kept


def vocabulary_sizes(rows: int, size: int) -> tuple[int, ...]:
    """How many rows of the head each rank has."""
    return shard_sizes(rows, size)


def _sum_over_ranks(model: Any, path: str, found: LayerCuts, process_group: Any) -> None:
    """Puts DeepSpeed's layers in place of the cut ones of one decoder layer."""
    layer = model.get_submodule(path)
    for name, cut in found.cuts.items():
        owner, _, attribute = name.rpartition(".")
        module = layer.get_submodule(owner)
        if (
            attribute != "weight"
            or isinstance(cut, Whole)
            or not (isinstance(module, nn.Linear) or _is_transposed(module))
        ):
            continue
        parent, _, child = owner.rpartition(".")
        setattr(layer.get_submodule(parent), child, _parallel(module, process_group, reduced=cut.reduced))
    for block in found.reduced_blocks:
        layer.get_submodule(block).register_forward_hook(_SumOutput(process_group))


def _spread_norm(
    model: Any, path: str, found: LayerCuts, name: str, rank: int, size: int, process_group: Any
) -> None:  # fmt: skip
    """A norm over all heads together, whose sum goes over the ranks; a head that several have counts once in all."""
    cut = found.cuts[f"{name}.weight"]
    assert isinstance(cut, HeadCut)
    queries = cut.order is HeadOrder.QUERY
    shares = head_shares(cut.num_heads, cut.num_kv_heads, size)
    holders = 1 if queries else sum(share.kv_heads.start in shares[rank].kv_heads for share in shares)
    width = (cut.num_heads if queries else cut.num_kv_heads) * cut.unit
    parent, _, child = path.rpartition(".")
    norm = wide_norm(
        model.get_submodule(path), path, width, 1.0 / holders, lambda total: all_reduce(total, process_group)
    )
    setattr(model.get_submodule(parent), child, norm)


def _parallel(module: nn.Module, process_group: Any, *, reduced: bool) -> nn.Module:
    if _is_transposed(module):
        return TransposedRow(module, process_group) if reduced else module
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    # Made without a group they leave the weight, which is cut already, as it is.
    layer: Any = LinearAllreduce(module, None) if reduced else LinearLayer(module, None)
    layer.mp_group = process_group
    assert isinstance(layer, nn.Module)
    return layer


def all_reduce(tensor: torch.Tensor, process_group: Any) -> torch.Tensor:
    """The sum over the group, in place."""
    import deepspeed.comm

    deepspeed.comm.inference_all_reduce(tensor, group=process_group)
    return tensor


class TransposedRow(nn.Module):
    """GPT-2's Conv1D (weight ``[in, out]``), this rank's rows of it."""

    def __init__(self, module: Any, process_group: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = module.weight
        self.bias: nn.Parameter = module.bias
        self._process_group = process_group

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = hidden @ self.weight
        return all_reduce(product, self._process_group) + self.bias


@dataclass(frozen=True)
class _SumOutput:
    """A forward hook: the module's output is this rank's part of a sum."""

    process_group: Any

    def __call__(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return all_reduce(output.contiguous(), self.process_group)
