"""Decoder layers on a CPU without the Python of transformers' modules: at few rows that is as long as the arithmetic.

A layer of the usual shape (norm, attention, add, norm, MLP, add) gets a forward of ours, made of the parts that are
in it by then. Before, both are run on this very layer, beside each other; a layer that has other parts, hooks, or
another result keeps its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cluster.engine.model import agreement, kernels, last_layer, native_attention, products, whole_layer
from cluster.engine.model.attention import Bound
from cluster.engine.model.block_tables import StepLayout
from cluster.engine.model.layer_proof import AttentionCall, LayerProof
from cluster.engine.model.whole_layer import LayerParts, NormWeights, WholeLayer

_LOG = logging.getLogger(__name__)
_PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION = (frozenset({*_QKV, "o_proj"}), frozenset({"qkv_proj", "o_proj"}))
_HEAD_NORMS = frozenset({"q_norm", "k_norm"})
# What base models hand to every layer that changes nothing in a layer without a cache of transformers'.
_IDLE = frozenset({"position_ids", "use_cache", "is_causal"})
Forward = Callable[..., torch.Tensor]


class FusedNorm:
    """An RMSNorm's forward by the library; ``original`` where a tensor is of another type than the weight."""

    __slots__ = ("_library", "_original", "dtype", "early", "eps", "offset", "weight")

    def __init__(
        self,
        library: kernels.Kernels,
        weight: torch.Tensor,
        eps: float,
        offset: float,
        original: Forward,
        *,
        early: bool,
    ) -> None:
        self._library, self._original = library, original
        self.weight, self.eps, self.offset, self.early, self.dtype = weight, eps, offset, early, weight.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not self.dtype:
            return self._original(x)
        return self._library.rms_norm(x, self.weight, self.eps, self.offset, early=self.early)

    def after_adding(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``residual + x``, which is new, and its norm; both ``[1, tokens, width]`` of the weight's type."""
        return self._library.add_rms_norm(x, residual, self.weight, self.eps, self.offset, early=self.early)


class FusedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, gate and up in one product; ``down`` is the family's own, or what replaces it."""

    def __init__(self, gate_up: products.Product, down: nn.Module, act: Any, silu_mul: Forward | None) -> None:
        super().__init__()
        self.gate_up, self.down, self.act, self._silu_mul = gate_up, down, act, silu_mul

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)
        if self._silu_mul is not None:
            return self.down(self._silu_mul(both))  # type: ignore[no-any-return]
        gate, up = both.chunk(2, dim=-1)
        return self.down(self.act(gate) * up)  # type: ignore[no-any-return]

    @property
    def is_silu(self) -> bool:
        return self._silu_mul is not None

    def straight(self) -> Forward:
        """``forward`` of the parts that are in it now, without looking them up each time."""
        gate_up, silu_mul, down = self.gate_up.forward, self._silu_mul, self.down.forward
        if silu_mul is None:
            return self.forward
        return lambda x: down(silu_mul(gate_up(x)))


def _straight(mlp: Any) -> Forward:
    fused = getattr(mlp, "fused", None)
    forward: Forward = fused.straight() if isinstance(fused, FusedMLP) else mlp.forward
    return forward


class _LeanLayer:
    """The forward of one layer. What a step hands over that is not of the usual kind goes to the layer's own."""

    __slots__ = (
        "_add_norm", "_attend", "_attention", "_bound", "_dtype", "_features", "_heads", "_key_dim", "_key_norm",
        "_kv_heads", "_kv_of", "_library", "_merged", "_mlp", "_multiplier", "_norm", "_o", "_original", "_parts",
        "_qkv", "_query_norm", "_rotated", "_value_dim", "_whole", "only_sampled",
    )  # fmt: skip

    def __init__(
        self, layer: Any, library: kernels.Kernels, qkv: products.Product, seen: AttentionCall, *, rotated: bool
    ) -> None:
        attention = layer.self_attn
        self._library, self._attention, self._original = library, attention, layer.forward
        self._norm: FusedNorm = layer.input_layernorm.forward
        self._add_norm = layer.post_attention_layernorm.forward.after_adding
        self._query_norm: Forward | None = getattr(getattr(attention, "q_norm", None), "forward", None)
        self._key_norm: Forward | None = getattr(getattr(attention, "k_norm", None), "forward", None)
        self._qkv, self._o, self._mlp = qkv.forward, attention.o_proj.forward, _straight(layer.mlp)
        self._multiplier = getattr(layer, "residual_multiplier", 1.0)
        self._features, self._rotated = seen.features, rotated
        (_, self._heads, self._key_dim), (_, self._kv_heads, self._value_dim) = seen.query.shape, seen.value.shape
        self._dtype = self._norm.dtype
        self._bound: Bound | None = None
        self._attend: Forward = self._by_parts
        self._parts: LayerParts | None = None
        self._whole: WholeLayer | None = None
        self._merged, self._kv_of = qkv, qkv.forward  # the latter may come to be without queries
        self.only_sampled = False  # see ``leave_out``

    def forward(
        self,
        hidden_states: torch.Tensor,
        *more: Any,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Any:
        """What the layer's own forward gives for the packed tokens of a step."""
        if more:
            named = {"position_embeddings": position_embeddings, "attention_mask": attention_mask,
                     "past_key_values": past_key_values}  # fmt: skip
            given = {name: value for name, value in named.items() if value is not None}
            return self._original(hidden_states, *more, **given, **others)
        if (
            attention_mask is not None
            or past_key_values is not None
            or not _IDLE.issuperset(others)
            or not self._suits(hidden_states, position_embeddings)
        ):
            return self._original(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                past_key_values=past_key_values, **others,
            )  # fmt: skip
        bound: Bound = self._attention.paged
        if bound is not self._bound:
            self._bind(bound)
        layout = bound.cache.layout
        assert layout is not None, "a step has begun"
        cos, sin = position_embeddings
        if self.only_sampled and last_layer.pays(hidden_states.shape[1], len(layout.sampled)):
            return self._of_sampled(hidden_states, cos, sin, layout)
        return self._run(hidden_states, cos, sin, layout)

    def _run(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        """The layer's result of all tokens."""
        if self._whole is not None and hidden.shape[1] <= whole_layer.MOST_ROWS:
            return self._whole(hidden, cos, sin, layout)
        x = self._o(self._attend(self._qkv(self._norm(hidden)), cos, sin, layout))
        if self._multiplier != 1.0:
            x *= self._multiplier
        total, x = self._add_norm(x, hidden)
        x = self._mlp(x)
        if self._multiplier != 1.0:
            x = x * self._multiplier
        total += x
        return total  # type: ignore[no-any-return]

    def _of_sampled(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: StepLayout
    ) -> torch.Tensor:
        """Keeps all keys and values; then those tokens after which one is sampled are a step of their own."""
        bound = self._bound
        assert bound is not None
        if isinstance(self._attend, native_attention.MergedAttention):
            self._attend.store(self._kv_of(self._norm(hidden)), cos, sin, layout)
        else:
            _, key, value = self.parts(self.project(hidden), cos, sin)
            bound.pool.write(layout.kv_slots, key, value)
        if not len(layout.sampled):
            return hidden[:, :0]
        hidden, cos, sin = (x.index_select(1, layout.sampled) for x in (hidden, cos, sin))
        return self._run(hidden, cos, sin, layout.of_sampled())

    def _suits(self, hidden: torch.Tensor, angles: Any) -> bool:
        if type(angles) is not tuple or len(angles) != 2:
            return False
        cos, sin = angles
        shape = (1, hidden.shape[1], self._key_dim)
        return (
            hidden.dtype is cos.dtype is sin.dtype is self._dtype
            and cos.shape == shape == sin.shape
            and cos.stride() == sin.stride()
            and cos.stride(2) == 1
        )

    def _bind(self, bound: Bound) -> None:
        """From now on it attends with ``bound``."""
        self._bound, self._whole = bound, None
        plain = self._rotated and self._query_norm is None and self._features.block_sparse is None
        if plain and bound.kernel is native_attention.attend:
            self._attend = merged = native_attention.MergedAttention(self._heads, bound.pool, self._features)
            if self._parts is not None and whole_layer.fits(self._parts, merged):
                self._whole = WholeLayer(self._library, self._parts, merged)
        else:
            self._attend = self._by_parts

    def _by_parts(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        bound = self._bound
        assert bound is not None
        out = bound.kernel(*self.parts(qkv, cos, sin), bound.pool, layout, self._features)
        return out.flatten(1).unsqueeze(0)

    def parts(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as an attention kernel takes them, of the merged product, contiguous."""
        _, tokens, width = qkv.shape
        key_dim, value_dim, offset = self._key_dim, self._value_dim, qkv.storage_offset()
        key_at = offset + self._heads * key_dim
        value_at = key_at + self._kv_heads * key_dim
        q = qkv.as_strided((tokens, self._heads, key_dim), (width, key_dim, 1), offset)
        k = qkv.as_strided((tokens, self._kv_heads, key_dim), (width, key_dim, 1), key_at)
        v = qkv.as_strided((tokens, self._kv_heads, value_dim), (width, value_dim, 1), value_at)
        if self._query_norm is not None and self._key_norm is not None:
            q, k = self._query_norm(q), self._key_norm(k)
        if self._rotated:
            q, k = self._library.rotate_pair(q, k, cos, sin)
        return q, k, v

    def leave_out(self, *, others: bool) -> None:
        """From now on, where that pays, results are only of the tokens after which one is sampled; or of all again."""
        alone = self._merged.columns_from(self._heads * self._key_dim) if others else None
        self.only_sampled, self._kv_of = others, self._qkv if alone is None else alone.forward

    def as_a_whole(self, parts: LayerParts | None) -> None:
        """From now on few rows go through ``parts`` in one call where that fits, or through none."""
        self._parts, self._bound = parts, None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The merged product of the normed hidden states."""
        return self._qkv(self._norm(hidden))


# ------------------------------------------------------------------------------------------------------- the proof


def replace(layer: nn.Module, unanimous: Callable[[bool], bool]) -> bool:
    """Gives ``layer`` a forward of ours if it is of the usual shape and gives what its own gives.

    It is made of the products and norms that are in the layer by now, which stay its own. Every rank of a group calls
    this at the same time; ``unanimous`` says whether all of them vote yes, so that all make the same passes.
    """
    if not _has_the_parts(layer):
        return False
    library, qkv = kernels.load(), _merged(layer)
    if not unanimous(library is not None and qkv is not None and _is_usual(layer, qkv)):
        return False
    assert library is not None
    assert qkv is not None
    lean, attributes = None, layer.self_attn.__dict__
    before = attributes.get("paged")
    try:
        with _without_peers(layer):
            lean = _proven(layer, library, qkv)
    except Exception as error:  # boundary: any family's layer, given what may not be its arguments
        _LOG.debug("%s keeps its own forward: %s", type(layer).__name__, error)
    finally:
        attributes.pop("paged", None)
        if before is not None:
            attributes["paged"] = before
    if not unanimous(lean is not None):
        return False
    assert lean is not None
    layer.forward = lean.forward
    return True


@contextmanager
def _without_peers(layer: nn.Module) -> Iterator[None]:
    """Products keep to this rank: one that fails where the others do not must not leave them waiting for its sum."""
    summed = [
        module for module in layer.modules() if isinstance(module, products.Product) and module.reduce is not None
    ]
    before = [module.reduce for module in summed]
    for module in summed:
        module.reduce = _nothing
    try:
        yield
    finally:
        for module, reduce in zip(summed, before, strict=True):
            module.reduce = reduce


def _nothing(part: torch.Tensor) -> None:
    del part


def _has_the_parts(layer: nn.Module) -> bool:
    """By names alone, which every rank has the same."""
    names = {name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)}
    attention = getattr(layer, "self_attn", None)
    if names != _PARTS or not isinstance(attention, nn.Module):
        return False
    inner = {name for name, _ in attention.named_children()}
    return inner in _ATTENTION or (inner >= _HEAD_NORMS and inner - _HEAD_NORMS in _ATTENTION)


def _merged(layer: Any) -> products.Product | None:
    """The product of q, k and v in one, which most families' are by now and some families' always were."""
    attention = layer.self_attn
    if hasattr(attention, "qkv_proj"):
        return attention.qkv_proj if isinstance(attention.qkv_proj, products.Product) else None
    return products.whole([getattr(attention, name) for name in _QKV])


def _is_usual(layer: Any, qkv: products.Product) -> bool:
    """Whether it can be tried: norms of ours, no hooks, a known width of heads."""
    attention = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    head_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    forwards = [norm.__dict__.get("forward") for norm in (*norms, *head_norms)]
    widths = [qkv.in_features] * 2 + [getattr(attention, "head_dim", None)] * len(head_norms)
    return (
        isinstance(getattr(attention, "head_dim", None), int)
        and not layer.training
        and getattr(getattr(attention, "config", None), "clip_qkv", None) is None  # shows only at rare inputs
        and next(layer.parameters(recurse=False), None) is None
        and all(isinstance(f, FusedNorm) and len(f.weight) == width for f, width in zip(forwards, widths, strict=True))
        and not any(inner is not layer and is_hooked(inner) for inner in layer.modules())
        and isinstance(getattr(layer, "residual_multiplier", 1.0), (int, float))
    )


def is_hooked(module: nn.Module) -> bool:
    """A hook would be lost with its module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


_PROVEN_WITH_MORE: set[tuple[object, ...]] = set()


def _proven(layer: Any, library: kernels.Kernels, qkv: products.Product) -> _LeanLayer | None:
    """Ours, where all that it computes agrees: queries, keys and values, what is kept of them, and the result."""
    proof = LayerProof(layer.self_attn, qkv.in_features, layer.input_layernorm.forward.dtype)
    expected, seen = proof.original(layer.forward)
    for rotated in (True, False):  # some families rotate in some layers only
        lean = _LeanLayer(layer, library, qkv, seen, rotated=rotated)
        parts = lean.parts(lean.project(proof.hidden), *proof.angles)
        right = all(
            agreement.agree_at_all_scales(mine[None], theirs[None])
            for mine, theirs in zip(parts, (seen.query, seen.key, seen.value), strict=True)
        )
        if right:
            break
    got, pool = proof.mine(lean.forward, seen)
    right = right and agreement.agree(pool.keys, seen.pool.keys) and agreement.agree(pool.values, seen.pool.values)
    if not right or not agreement.agree_at_all_scales(got, expected):
        return None
    whole = _parts_of(layer, qkv)
    if whole is None:
        return lean
    # What more tokens change does not lie in the weights: one layer of each shape is tried with them.
    shape = (type(layer), rotated, whole.shapes)
    by_parts = [(False, got, pool)]
    if shape not in _PROVEN_WITH_MORE:
        by_parts.append((True, *proof.mine(lean.forward, seen, more=True)))
    lean.as_a_whole(whole)
    for more, expected, kept in by_parts:
        got, pool = proof.mine(lean.forward, seen, more=more)
        right = agreement.agree(pool.keys, kept.keys) and agreement.agree(pool.values, kept.values)
        if not right or not agreement.agree_at_all_scales(got, expected):
            lean.as_a_whole(None)
            return lean
    _PROVEN_WITH_MORE.add(shape)
    return lean


def _parts_of(layer: Any, qkv: products.Product) -> LayerParts | None:
    """What one call of the library needs; None where something else stands between."""
    o, mlp = layer.self_attn.o_proj, getattr(layer.mlp, "fused", None)
    if not isinstance(o, products.Product) or not isinstance(mlp, FusedMLP) or not mlp.is_silu:
        return None
    if (
        qkv.whole_few_rows is None
        or not isinstance(mlp.down, products.Product)
        or getattr(layer, "residual_multiplier", 1.0) != 1.0
    ):
        return None
    first, second = (
        NormWeights(norm.forward.weight, norm.forward.eps, norm.forward.offset)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    )
    return LayerParts(first, qkv, o, second, mlp.gate_up, mlp.down)
