"""A forward pass on meta that finds every attention call of a model, and proves that it is one we can serve.

It costs no memory and well under a second for the largest models: shapes flow, numbers do not. What a model asks of
its masks, what it hands to its attention, and which modules call it, is seen before a byte is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import nn

from cluster.domain.errors import UnsupportedModelError

IMPLEMENTATION = "llm_cluster_probe"
_TOKENS = 5
_LONGEST_MASK = 2**18  # positions up to which a mask is looked at
# What attention calls hand over besides query, key and value, that changes nothing or that we serve.
_KNOWN = frozenset({
    "dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "layer_idx", "deterministic",
    "cache_position", "return_dict", "position_embeddings", "past_key_values", "max_seqlen", "mask_attention",
    "q_idx", "training",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention call of the whole model: the module at ``name`` that makes it, and its unsharded sizes.

    ``key_dim`` is the width of a query's and a key's head, ``value_dim`` that of a value's; ``sliding_window`` counts
    the token itself, None looks back on everything.
    """

    name: str
    layer: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None


@dataclass
class _Findings:
    names: dict[int, str]
    layers: list[AttentionLayer] = field(default_factory=list)
    masks: list[tuple[torch.Tensor, int | None]] = field(default_factory=list)  # given to the model, and their windows
    strange_masks: list[torch.Tensor] = field(default_factory=list)  # neither causal nor a window
    refusal: str = ""


_findings: _Findings | None = None


def register() -> None:
    """Makes the probe's attention and masks known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _record_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _record_mask)


def interface() -> Callable[..., Any]:
    """The attention function to call now: the probe's while a model is examined, else ours."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from cluster.engine.model import attention

    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[
        IMPLEMENTATION if _findings is not None else attention.IMPLEMENTATION
    ]
    return function


def examine(model: Any) -> None:
    """Runs ``model`` (on meta, unsharded) once, and leaves ``model.attention_layers`` behind.

    UnsupportedModelError, in one sentence, when a decoder layer's attention does not reach us exactly once, when it
    wants a mask or an argument that we do not serve, or when tokens are mixed outside attention.
    """
    global _findings  # noqa: PLW0603 - transformers' interface is global; one model is examined at a time
    name = type(model).__name__
    base = model.base_model
    for module in base.modules():
        if isinstance(module, nn.Conv1d):
            raise UnsupportedModelError(
                f"{name} mixes tokens in {type(module).__name__} layers, outside attention; only models whose layers "
                "are attention and feed-forward are served."
            )
    findings = _Findings({id(module): path for path, module in model.named_modules()})
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_attention_implementation(model, IMPLEMENTATION))
        stack.enter_context(_without_data(base))
        _findings = findings
        try:
            _run(base)
        except Exception as error:  # boundary: the forward passes of hundreds of model classes
            reason = findings.refusal or f"its forward pass cannot be followed without weights ({line(error)})"
            raise UnsupportedModelError(f"{name} is not served: {reason}.") from error
        finally:
            _findings = None
    layers, expected = findings.layers, int(model.config.get_text_config().num_hidden_layers)
    calls = Counter(layer.layer for layer in layers)
    if sorted(calls.elements()) != list(range(expected)):
        layer, most = max(calls.items(), key=itemgetter(1), default=(0, 0))
        found = f"of its {expected} layers the attention of {len(calls)} can be paged"
        raise UnsupportedModelError(
            f"{name} is not served: {found if most < 2 else f'its layer {layer} attends {most} times'}; "
            "all must have plain attention, once each."
        )
    _check_cache(model, findings.layers)
    model.attention_layers = tuple(sorted(layers, key=lambda layer: layer.layer))


def _check_cache(model: Any, layers: list[AttentionLayer]) -> None:
    """UnsupportedModelError where transformers' own cache would forget tokens that the attention may look at.

    Then tokens depend on how a prompt was cut into passes, and there is no one right answer to be exact to.
    """
    from transformers import DynamicCache

    kept = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    for layer in layers:
        if layer.layer < len(kept) and kept[layer.layer] not in (None, layer.sliding_window):
            raise UnsupportedModelError(
                f"{type(model).__name__} is not served: transformers' cache keeps {kept[layer.layer]} tokens of "
                f"{layer.name}, whose attention looks back on more."
            )


def _run(base: Any) -> None:
    from transformers import DynamicCache

    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    positions = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    # A cache keeps the mask functions from looking into the positions for packed sequences.
    base(input_ids=tokens, position_ids=positions, past_key_values=DynamicCache(), use_cache=True)


def _record_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Stands in for attention: notes the call and gives a result of the right shape."""
    assert _findings is not None
    name = _findings.names.get(id(module), "")
    strange = sorted(n for n, v in options.items() if n not in _KNOWN and v is not None and v is not False)
    if strange:
        _refuse(f"{name} hands its attention the argument {strange[0]!r}")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        _refuse(f"{name} is not causal")
    if query.shape[2] != key.shape[2] or query.shape[0] != 1:
        _refuse(f"{name} attends to other tokens than its own sequence's")
    window = options.get("sliding_window")
    if attention_mask is not None:
        # The mask is what transformers goes by; some models do not tell their attention the window beside it.
        if any(mask is attention_mask for mask in _findings.strange_masks):
            _refuse(f"{name} wants a mask that is neither causal nor a sliding window")
        known = [of_mask for mask, of_mask in _findings.masks if mask is attention_mask]
        if not known:
            _refuse(f"{name} makes a mask of its own")
        window = known[0]
    if window != options.get("sliding_window"):
        module.mask_window = window
    layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    _findings.layers.append(
        AttentionLayer(name, layer, query.shape[1], key.shape[1], key.shape[3], value.shape[3], window)
    )
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _record_mask(*, mask_function: Callable[..., Any], config: Any = None, **_: Any) -> torch.Tensor:
    """Stands in for making a mask: notes its window, and gives something to recognise it by."""
    assert _findings is not None
    longest = getattr(config, "max_position_embeddings", None)
    reach = min(max(longest if isinstance(longest, int) else 0, 2048) + 8, _LONGEST_MASK)
    mask = torch.empty(1, 1, _TOKENS, _TOKENS, dtype=torch.bool, device="meta")
    try:
        _findings.masks.append((mask, _window(mask_function, reach)))
    except (RuntimeError, TypeError, ValueError, IndexError):
        _findings.strange_masks.append(mask)  # models also ask for masks that none of their layers uses
    return mask


def _window(mask_function: Callable[..., Any], reach: int) -> int | None:
    """The sliding window that ``mask_function`` is, None for a plain causal mask; ValueError for anything else."""
    with torch.device("cpu"):
        zero, keys = torch.zeros((), dtype=torch.long), torch.arange(reach)

        def seen(query: int) -> torch.Tensor:
            return torch.as_tensor(mask_function(zero, zero, torch.tensor(query), keys)).expand(reach)

        first = int(seen(reach - 1).int().argmax())
        window = reach - first if first else None
        near = {0, 1, 2, 63, 64, 511, 512, reach - 1}
        queries = near | {(window or 0) * n + d for n in (1, 2) for d in (-1, 0, 1)}
        for query in (q for q in queries if 0 <= q < reach):
            expected = keys <= query
            if window is not None:
                expected &= keys > query - window
            if not torch.equal(seen(query), expected):
                raise ValueError
    return window


def _refuse(reason: str) -> NoReturn:
    assert _findings is not None
    _findings.refusal = _findings.refusal or reason
    raise ValueError(reason)


@contextmanager
def _attention_implementation(model: Any, implementation: str) -> Iterator[None]:
    """Every config of ``model`` names ``implementation`` meanwhile."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]  # noqa: SLF001
    try:
        for config in configs:
            config._attn_implementation_internal = implementation  # noqa: SLF001 - past its checks, as transformers does
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name  # noqa: SLF001


@contextmanager
def _without_data(base: nn.Module) -> Iterator[None]:
    """Takes out what looks at numbers: frequencies by length, and experts by token."""
    with ExitStack() as stack:
        for module in base.modules():
            kind = getattr(module, "rope_type", None)
            if kind is not None:
                stack.callback(setattr, module, "rope_type", kind)
                plain = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
                module.rope_type = plain  # type: ignore[assignment]
            if any(p.dim() == 3 for p in module._parameters.values() if p is not None):  # noqa: SLF001
                stack.callback(module.__dict__.pop, "forward", None)
                module.forward = _expert_shapes
        yield


def _expert_shapes(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Experts give each token a row like its own."""
    return torch.empty_like(hidden)


def line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
