"""Which tensors of a decoder layer tensor parallelism cuts, told by their names and shapes.

A layer is looked at block by block: tensors with one parent (``self_attn``, ``mlp``, ``mlp.experts``). An attention
block is cut by heads, a feed-forward block by its inner width; a block is cut only when every tensor in it is
understood. A feed-forward block that is not is computed whole by every rank, which is right if wasteful; a layer whose
attention is not understood is an objection to more than one rank.

Names are those of the checkpoint or of transformers' parameters: both give the same cuts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.checkpoint.splits import WHOLE, Cut, GrainCut, HeadCut, HeadOrder, Whole
from cluster.domain.model_spec import LayerShape

Shape = tuple[int, ...]
# (name below the layer, shape), in any order.
LayerTensors = tuple[tuple[str, Shape], ...]

_QUERY = frozenset({"q_proj", "query_proj", "wq", "q", "query"})
_KEY = frozenset({"k_proj", "key_proj", "wk", "k", "key"})
_VALUE = frozenset({"v_proj", "value_proj", "wv", "v", "value"})
_FUSED = frozenset({"qkv_proj", "query_key_value", "Wqkv", "c_attn"})
_OUTPUT = frozenset({"o_proj", "out_proj", "dense", "c_proj", "wo"})
# Latent attention: what makes heads out of the latents, and what makes and norms the latents.
_LATENT_QUERY = frozenset({"q_b_proj", "q_proj"})
_LATENT_KV = frozenset({"kv_b_proj"})
_LATENTS = frozenset({"q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"})
# A norm over each head's own width, the same for all heads.
_HEAD_NORMS = frozenset({"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"})
_SINKS = frozenset({"sinks", "attention_sink_bias"})  # GPT-OSS, MiMo-V2
# What multiplies the heads' output before the output projection: a number for each of its elements, or for each head.
_OUTPUT_GATES = frozenset({"gate_proj", "g_proj"})
_FFN_IN = frozenset({
    "gate_proj", "up_proj", "w1", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "wi", "wi_0", "wi_1", "gate_up_proj",
    "proj_1", "linear_fc1", "input_linear",
})  # fmt: skip
_FFN_OUT = frozenset({
    "down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "wo", "proj_2", "linear_fc2", "output_linear",
})  # fmt: skip
# Twice the inner width: all gates, then all ups.
_GATE_UP = frozenset({"gate_up_proj", "proj_1", "input_linear"})
# How a fused projection of queries, keys and values lies. One KV head: both orders are the same.
_ORDERS = {
    "BloomForCausalLM": HeadOrder.GROUPED,
    "DbrxForCausalLM": HeadOrder.CONCATENATED,
    "FalconForCausalLM": HeadOrder.GROUPED,
    "GPT2LMHeadModel": HeadOrder.CONCATENATED,
    "GPTBigCodeForCausalLM": HeadOrder.GROUPED,
    "GPTNeoXForCausalLM": HeadOrder.GROUPED,
    "GPTNeoXJapaneseForCausalLM": HeadOrder.GROUPED,
    "MptForCausalLM": HeadOrder.CONCATENATED,
    "OpenAIGPTLMHeadModel": HeadOrder.CONCATENATED,
    "OpenELMForCausalLM": HeadOrder.CONCATENATED,
    "PersimmonForCausalLM": HeadOrder.GROUPED,
    "Phi3ForCausalLM": HeadOrder.CONCATENATED,
    "Phi3SmallForCausalLM": HeadOrder.GROUPED,
}
# Gate and up take turns, one row each.
_INTERLEAVED_GATES = frozenset({"Phi3SmallForCausalLM", "GptOssForCausalLM"})
# Their linear layers keep [in, out].
TRANSPOSED = frozenset({"GPT2LMHeadModel", "OpenAIGPTLMHeadModel"})
# Something is computed over the whole inner width of their feed-forward blocks.
_UNCUT_FFN = frozenset({"Gemma3nForCausalLM"})


@dataclass(frozen=True, slots=True)
class LayerCuts:
    """``cuts``: of every tensor of the layer. ``heads``: query and KV heads of its attention, where it was understood.

    ``reduced_blocks``: parents whose output must be summed over the ranks as a whole (experts kept in one tensor).
    ``wide_norms``: modules that are a norm over all queries' or all keys' heads together (OLMo-2).
    ``objection``: half a sentence on why more than one rank is not possible, empty when it is.
    """

    cuts: Mapping[str, Cut]
    heads: tuple[int, int] | None = None
    attention: str = ""
    reduced_blocks: tuple[str, ...] = ()
    wide_norms: tuple[str, ...] = ()
    objection: str = ""


@functools.lru_cache(maxsize=1024)
def layer_cuts(architecture: str, head_dim: int, shape: LayerShape, tensors: LayerTensors) -> LayerCuts:
    """The cuts of one layer. ``head_dim`` and ``shape`` as the config has them."""
    cuts: dict[str, Cut] = {name: WHOLE for name, _ in tensors}
    blocks = _blocks(tensors)
    found: _Attention | None = None
    reduced = []
    for block in blocks:
        attention = _latent_attention(head_dim, block) or _attention(architecture, head_dim, shape, block)
        if attention is not None and found is not None:
            return LayerCuts(cuts, objection="its layers have two attention blocks")
        if attention is not None:
            found = attention
            cuts.update(attention.cuts)
            continue
        ffn = _feed_forward(architecture, block)
        cuts.update(ffn)
        if any(len(block.shapes[name]) == 3 for name in ffn):
            reduced.append(block.parent)
    if found is None:
        return LayerCuts(cuts, objection="no attention with separate query, key, value and output projections is there")
    return LayerCuts(cuts, found.heads, found.parent, tuple(reduced), _wide_norms(found), found.objection)


def _wide_norms(attention: _Attention) -> tuple[str, ...]:
    """Norms that are cut like a projection: more than one number for each head."""
    modules = ((name.rpartition(".")[0], cut) for name, cut in attention.cuts.items())
    return tuple(
        module
        for module, cut in modules
        if module.rpartition(".")[2] in _HEAD_NORMS and isinstance(cut, HeadCut) and cut.unit > 1
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """Tensors with one parent. ``children``: child -> its tensors' kind ("weight", "bias", "") -> full name.

    ``shapes``: of every tensor below the parent, deeper ones included.
    """

    parent: str
    children: Mapping[str, Mapping[str, str]]
    shapes: Mapping[str, Shape]

    def pick(self, names: frozenset[str]) -> list[str]:
        return [child for child in self.children if child in names]

    def weight(self, child: str) -> str:
        kinds = self.children[child]
        return kinds.get("weight") or kinds.get("") or ""

    def shape(self, child: str) -> Shape:
        return self.shapes.get(self.weight(child), ())


def _blocks(tensors: LayerTensors) -> list[_Block]:
    by_parent: dict[str, dict[str, dict[str, str]]] = {}
    for name, _ in tensors:
        path, _, last = name.rpartition(".")
        module, kind = (path, last) if last in {"weight", "bias"} else (name, "")
        parent, _, child = module.rpartition(".")
        by_parent.setdefault(parent, {}).setdefault(child, {})[kind] = name
    return [
        _Block(
            parent,
            children,
            {name: shape for name, shape in tensors if name.startswith(f"{parent}." if parent else "")},
        )
        for parent, children in by_parent.items()
    ]


@dataclass(frozen=True, slots=True)
class _Attention:
    parent: str
    cuts: Mapping[str, Cut]
    heads: tuple[int, int] | None
    objection: str = ""


def _attention(architecture: str, head_dim: int, shape: LayerShape, block: _Block) -> _Attention | None:
    """The cuts of ``block`` when it is an attention block, None when it is something else."""
    query, key, value = (block.pick(names) for names in (_QUERY, _KEY, _VALUE))
    fused, output = block.pick(_FUSED), block.pick(_OUTPUT)
    if not fused and not (query and key and value):
        return None
    turned = architecture in TRANSPOSED
    into, out = (1, 0) if turned else (0, 1)
    if len(output) != 1 or any(len(block.shape(child)) != 2 for child in (*query, *key, *value, *fused, *output)):
        return _Attention(block.parent, {}, None, f"{block.parent} has no plain output projection")
    cuts: dict[str, Cut] = {}
    if fused:
        order = _ORDERS.get(architecture)
        heads, kv_heads, unit = shape.num_heads, shape.num_kv_heads, head_dim
        if order is None:
            what = f"how {block.parent}.{fused[0]} holds queries, keys and values is not known"
            return _Attention(block.parent, {}, None, what)
        if len(fused) > 1 or block.shape(fused[0])[into] != (heads + 2 * kv_heads) * unit:
            return _Attention(block.parent, {}, None, f"the shape of {block.parent}.{fused[0]} is not understood")
        projections, value_unit = [(fused[0], order, unit)], unit
    else:
        rows = [block.shape(found[0])[into] for found in (query, key, value)]
        heads, kv_heads = rows[0] // head_dim, rows[1] // head_dim
        if not kv_heads or rows[0] % head_dim or rows[1] % head_dim or heads % kv_heads or rows[2] % kv_heads:
            return _Attention(
                block.parent, {}, None, f"{block.parent} has projections that are not made of whole heads"
            )
        value_unit = rows[2] // kv_heads
        projections = [
            (query[0], HeadOrder.QUERY, head_dim),
            (key[0], HeadOrder.KV, head_dim),
            (value[0], HeadOrder.KV, value_unit),
        ]
    if block.shape(output[0])[out] != heads * value_unit:
        return _Attention(block.parent, {}, None, f"the shape of {block.parent}.{output[0]} is not understood")
    for child, order, unit in projections:
        for kind, name in block.children[child].items():
            cuts[name] = HeadCut(0 if kind == "bias" else into, heads, kv_heads, order, unit)
    cuts[block.weight(output[0])] = HeadCut(out, heads, kv_heads, HeadOrder.QUERY, value_unit, reduced=True)
    known = {*query, *key, *value, *fused, *output}
    return _Attention(block.parent, cuts, (heads, kv_heads), _extras(block, known, cuts, (heads, kv_heads), head_dim))


def _latent_attention(head_dim: int, block: _Block) -> _Attention | None:
    """DeepSeek's: every rank makes the narrow latents whole, and its own heads' queries, keys and values of them."""
    query, latent, output = block.pick(_LATENT_QUERY), block.pick(_LATENT_KV), block.pick(_OUTPUT)
    if not latent:
        return None
    of_heads = (*query, *latent, *output)
    if len(of_heads) != 3 or any(len(block.shape(child)) != 2 for child in of_heads):
        return _Attention(block.parent, {}, None, f"the latent attention of {block.parent} is not understood")
    rows, widened, width = block.shape(query[0])[0], block.shape(latent[0])[0], block.shape(output[0])[1]
    heads = rows // head_dim
    if not heads or rows % head_dim or widened % heads or width % heads:
        return _Attention(block.parent, {}, None, f"{block.parent} has projections that are not made of whole heads")
    prefix = f"{block.parent}." if block.parent else ""
    known = _LATENTS | set(of_heads)
    strange = [name for name in block.shapes if name.removeprefix(prefix).partition(".")[0] not in known]
    if strange:
        return _Attention(block.parent, {}, None, f"what {strange[0]} does across heads is not known")
    cuts: dict[str, Cut] = {}
    for child, unit in ((query[0], head_dim), (latent[0], widened // heads)):
        for name in block.children[child].values():
            cuts[name] = HeadCut(0, heads, heads, HeadOrder.QUERY, unit)
    cuts[block.weight(output[0])] = HeadCut(1, heads, heads, HeadOrder.QUERY, width // heads, reduced=True)
    return _Attention(block.parent, cuts, (heads, heads))


def _extras(
    block: _Block, known: set[str], cuts: dict[str, Cut], heads: tuple[int, int], head_dim: int
) -> str:  # fmt: skip
    """Cuts what else an attention block holds; the objection to what is not understood."""
    prefix = f"{block.parent}." if block.parent else ""
    of_known = {name for child in known for name in block.children[child].values()}
    for name, shape in block.shapes.items():
        child, _, rest = name.removeprefix(prefix).partition(".")
        if name in of_known or math.prod(shape) == 1 or (not prefix and child not in block.children):
            continue
        is_norm = child in _HEAD_NORMS and rest in {"weight", "bias"}
        own = heads[0] if child.startswith("q") else heads[1]
        if is_norm and shape == (head_dim,):
            continue
        if is_norm and shape == (own, head_dim):
            order = HeadOrder.QUERY if child.startswith("q") else HeadOrder.KV
            cuts[name] = HeadCut(0, *heads, order, 1)
        elif is_norm and rest == "weight" and shape == (own * head_dim,):
            order = HeadOrder.QUERY if child.startswith("q") else HeadOrder.KV
            cuts[name] = HeadCut(0, *heads, order, head_dim)
        elif child in _SINKS and shape == (heads[0],):
            cuts[name] = HeadCut(0, *heads, HeadOrder.QUERY, 1)
        elif child in _OUTPUT_GATES and rest in {"weight", "bias"} and shape[0] in {heads[0], heads[0] * head_dim}:
            cuts[name] = HeadCut(0, *heads, HeadOrder.QUERY, shape[0] // heads[0])
        else:
            return f"what {name} does across heads is not known"
    return ""


def _feed_forward(architecture: str, block: _Block) -> dict[str, Cut]:
    """The cuts of ``block`` when it is a feed-forward block that is understood, else none."""
    inner, outer = block.pick(_FFN_IN), block.pick(_FFN_OUT)
    if len(outer) != 1 or not inner or architecture in _UNCUT_FFN:
        return {}
    if all(len(block.shape(child)) == 3 for child in (*inner, *outer)):
        return _experts(architecture, block, inner, outer[0])
    if any(len(block.shape(child)) != 2 or "weight" not in block.children[child] for child in (*inner, *outer)):
        return {}
    known = {name for child in (*inner, *outer) for name in block.children[child].values()}
    if block.parent and any(math.prod(s) > 1 for name, s in block.shapes.items() if name not in known):
        return {}
    turned = architecture in TRANSPOSED
    into, out = (1, 0) if turned else (0, 1)
    hidden, size = block.shape(outer[0])[into], block.shape(outer[0])[out]
    cuts: dict[str, Cut] = {}
    for child in inner:
        rows, columns = block.shape(child)[into], block.shape(child)[out]
        grain = _grain_cut(architecture, child, into, rows, size)
        if grain is None or columns != hidden:
            return {}
        for kind, name in block.children[child].items():
            cuts[name] = GrainCut(0, size, grain.parts, grain.unit) if kind == "bias" else grain
    cuts[block.weight(outer[0])] = GrainCut(out, size, reduced=True)
    return cuts


def _grain_cut(architecture: str, child: str, dim: int, rows: int, size: int) -> GrainCut | None:
    if rows == size and child not in _GATE_UP:
        return GrainCut(dim, size)
    if rows == 2 * size and architecture in _INTERLEAVED_GATES:
        return GrainCut(dim, size, unit=2)
    if rows == 2 * size and child in _GATE_UP:
        return GrainCut(dim, size, parts=2)
    return None


def _experts(architecture: str, block: _Block, inner: list[str], outer: str) -> dict[str, Cut]:
    """All experts in one tensor: ``[experts, out, in]``, or ``[experts, in, out]``."""
    biases = {f"{child}_bias" for child in (*inner, outer)}
    if set(block.children) - {*inner, outer} - biases or len(inner) != 1:
        return {}
    (child,) = inner
    first, second = block.shape(child), block.shape(outer)
    if first[2] == second[1]:
        into, out = 1, 2
    elif first[1] == second[2]:
        into, out = 2, 1
    else:
        return {}
    size = second[out]
    grain = _grain_cut(architecture, child, into, first[into], size)
    if grain is None:
        return {}
    cuts: dict[str, Cut] = {block.weight(child): grain, block.weight(outer): GrainCut(out, size, reduced=True)}
    for name in _bias_names(block, biases):
        cuts[name] = (
            Whole(counts_once=True) if name.endswith(f"{outer}_bias") else GrainCut(1, size, grain.parts, grain.unit)
        )
    return cuts


def _bias_names(block: _Block, biases: set[str]) -> Iterator[str]:
    return (block.weight(child) for child in block.children if child in biases)
