"""Tiny random checkpoints of every family that is tested, and of any other that transformers builds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOO_BIG = 3_000_000  # parameters; a family whose config does not shrink below it is left out
_SHARED = {"vocab_size": 320, "num_hidden_layers": 3, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
_LLAMA = _SHARED | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Model:
    """One row of the table: a family's model type and what of its config is not shared."""

    title: str
    model_type: str
    config: dict[str, Any]

    def build(self, folder: Path) -> Path:
        """Saves a checkpoint with large random weights, so that its tokens are far from uniform."""
        import transformers as hf

        if self.model_type == "openelm":
            return _save_plain(self.config, openelm_shapes(self.config), folder)
        if self.model_type == "phi3small":
            return _save_plain(self.config, phi3_small_shapes(self.config), folder)
        return save(hf.CONFIG_MAPPING[self.model_type](**self.config), folder)


def _llama(title: str, model_type: str = "llama", **own: Any) -> Model:
    return Model(title, model_type, _LLAMA | own)


def _rope(kind: str, **own: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **own}}


_LONG = {
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.5, 2.5, 4.0, 7.0],
    "original_max_position_embeddings": 24,
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_FALCON = _SHARED | {"hidden_size": 64, "num_attention_heads": 8, "tie_word_embeddings": True}
_OPENELM = {
    "model_type": "openelm", "architectures": ["OpenELMForCausalLM"], "num_transformer_layers": 3, "model_dim": 64,
    "head_dim": 8, "vocab_size": 320, "num_gqa_groups": 2, "num_query_heads": [4, 6, 8], "num_kv_heads": [2, 3, 4],
    "ffn_multipliers": [0.5, 4.0], "qkv_multipliers": [0.5, 1.0], "ffn_dim_divisor": 32, "max_context_length": 256,
    "rope_freq_constant": 10000, "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": "float32",
    "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig"},
}  # fmt: skip

_DEEPSEEK = _LLAMA | {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
_PHI3_SMALL = {
    "model_type": "phi3small", "architectures": ["Phi3SmallForCausalLM"], "vocab_size": 320, "eos_token_id": 2,
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "hidden_act": "gegelu", "gegelu_limit": 1.5, "ff_intermediate_size": 96, "max_position_embeddings": 256,
    "rope_embedding_base": 1000000, "blocksparse_block_size": 4, "blocksparse_num_local_blocks": 2,
    "blocksparse_vert_stride": 3, "blocksparse_homo_head_pattern": False, "dense_attention_every_n_layers": 2,
    "mup_use_scaling": True, "mup_width_multiplier": 8.0, "mup_embedding_multiplier": 3.0, "mup_attn_multiplier": 1.5,
    "dummy_token_indices": list(range(4, 320, 5)), "tie_word_embeddings": True,
    "auto_map": {"AutoConfig": "configuration_phi3_small.Phi3SmallConfig"},
}  # fmt: skip
_PHI3_SMALL_LONG = _PHI3_SMALL | {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "ff_intermediate_size": None,
    "ff_dim_multiplier": 3, "gegelu_pad_to_256": False, "dense_attention_every_n_layers": None,
    "blocksparse_vert_stride": 12, "tie_word_embeddings": False,
    "rope_scaling": {"type": "su", **_LONG, "short_mscale": 1.1, "long_mscale": 1.4},
}  # fmt: skip

NAMED: dict[str, Model] = {
    "llama-1": _llama("Llama 1, multi-head"),
    "llama-2-gqa": _llama("Llama 2, grouped heads", num_attention_heads=8, num_key_value_heads=4),
    "llama-3": _llama("Llama 3, llama3 RoPE", num_attention_heads=8, num_key_value_heads=2, **_rope("llama3", **_LLAMA3)),
    "llama-tied": _llama("Llama 3.2, tied head", num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True),
    "alpaca": _llama("Alpaca, odd vocabulary", vocab_size=321),
    "vicuna-16k": _llama("Vicuna 16k, linear RoPE x4", **_rope("linear", factor=4.0)),
    "llama-dynamic": _llama("Llama, dynamic RoPE past its length", max_position_embeddings=20, **_rope("dynamic", factor=4.0)),
    "llama-yarn": _llama("Llama, yarn RoPE", **_rope("yarn", factor=8.0, original_max_position_embeddings=32)),
    "llama-biases": _llama("Llama with biases everywhere", attention_bias=True, mlp_bias=True, num_key_value_heads=2),
    "llama-odd": _llama(
        "Llama, 7 heads on 1 KV head, odd sizes", hidden_size=84, num_attention_heads=7, num_key_value_heads=1, head_dim=10,
        intermediate_size=100, vocab_size=301,
    ),
    "llama-3kv": _llama(
        "Llama, 6 heads on 3 KV heads, tied", hidden_size=96, num_attention_heads=6, num_key_value_heads=3, head_dim=16,
        intermediate_size=176, vocab_size=301, tie_word_embeddings=True,
    ),
    "mistral": _llama("Mistral, sliding window", "mistral", num_attention_heads=8, num_key_value_heads=4, head_dim=8, sliding_window=7),
    "qwen2": _llama("Qwen2, window on some layers", "qwen2", num_attention_heads=8, num_key_value_heads=4, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": _llama("Qwen3, q/k norm", "qwen3", num_key_value_heads=2, head_dim=24),
    "gemma": _llama("Gemma, one KV head", "gemma", num_key_value_heads=1, head_dim=24, hidden_activation="gelu_pytorch_tanh"),
    "mixtral": _llama("Mixtral, experts", "mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "cohere": _llama("Cohere, interleaved rotary, q/k norm", "cohere", num_attention_heads=8, num_key_value_heads=2, use_qk_norm=True),
    "gemma-2": _llama("Gemma 2, soft caps, alternating windows", "gemma2", num_key_value_heads=2, head_dim=24, sliding_window=8, query_pre_attn_scalar=24),
    "gpt-oss": _llama("GPT-OSS, sinks and experts", "gpt_oss", num_key_value_heads=2, head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, **_rope("default")),
    "deepseek-v3": Model("DeepSeek-V3, latent attention and experts", "deepseek_v3", _DEEPSEEK),
    "deepseek-v3-direct": Model(
        "DeepSeek-V3, 5 heads, queries without latents", "deepseek_v3",
        _DEEPSEEK | {"num_attention_heads": 5, "num_key_value_heads": 5, "q_lora_rank": None},
    ),
    "bloom": Model("BLOOM, ALiBi", "bloom", _SHARED | {"hidden_size": 72, "n_head": 6, "n_layer": 3}),
    "gpt-neox": _llama("GPT-NeoX, partial rotary", "gpt_neox"),
    "phi-3-mini": _llama("Phi-3 mini, fused projections", "phi3", sliding_window=9),
    "phi-3-medium": _llama("Phi-3 medium, 10 KV heads", "phi3", hidden_size=160, num_attention_heads=20, num_key_value_heads=10),
    "phi-3-128k": _llama(
        "Phi-3 128k, longrope past its length", "phi3", hidden_size=64, num_attention_heads=8, original_max_position_embeddings=24,
        **_rope("longrope", **_LONG),
    ),
    "falcon-40b": Model("Falcon 40B and 180B", "falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "falcon-7b": Model("Falcon 7B, one KV head", "falcon", _FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-rw": Model(
        "Falcon RW, ALiBi", "falcon",
        _FALCON | {"hidden_size": 72, "num_attention_heads": 6, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    "mpt": Model(
        "MPT, ALiBi", "mpt",
        {"d_model": 72, "n_heads": 6, "n_layers": 3, "vocab_size": 320, "max_seq_len": 256, "eos_token_id": 2, "expansion_ratio": 4},
    ),
    "openelm": Model("OpenELM, layers that differ", "openelm", _OPENELM),
    "phi-3-small": Model("Phi-3 small, block-sparse", "phi3small", _PHI3_SMALL),
    "phi-3-small-128k": Model("Phi-3 small 128k, longrope past its length", "phi3small", _PHI3_SMALL_LONG),
}  # fmt: skip


def save(config: Any, folder: Path, seed: int = 0) -> Path:
    """A random model of ``config``: matrices with a large spread, norms around one, biases that matter."""
    import torch
    import transformers as hf

    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model)
    model.save_pretrained(folder)
    return folder


def _randomise(model: Any) -> None:
    import torch

    for name, parameter in model.named_parameters():
        around_one = (
            parameter.dim() == 1
            and "norm" in name.lower() + ("norm" if "ln_" in name else "")
            and not name.endswith("bias")
        )
        torch.nn.init.normal_(parameter, mean=1.0 if around_one else 0.0, std=0.2)


def _save_plain(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> Path:
    """Names and shapes as in the published checkpoints, config.json with its auto_map."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if name.endswith("norm.weight") else 0.0)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def openelm_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of an OpenELM with explicit heads, of widths that are multiples of the divisor."""
    width, head = fields["model_dim"], fields["head_dim"]
    layers = fields["num_transformer_layers"]
    low, high = fields["ffn_multipliers"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.token_embeddings.weight": (fields["vocab_size"], width)}
    for i in range(layers):
        heads, kv_heads = fields["num_query_heads"][i], fields["num_kv_heads"][i]
        factor = round(low + (high - low) * i / (layers - 1), 2)
        divisor = fields["ffn_dim_divisor"]
        ffn = int(max(divisor, int(factor * width + divisor / 2) // divisor * divisor))
        prefix = f"transformer.layers.{i}"
        shapes |= {
            f"{prefix}.attn.qkv_proj.weight": ((heads + 2 * kv_heads) * head, width),
            f"{prefix}.attn.q_norm.weight": (head,),
            f"{prefix}.attn.k_norm.weight": (head,),
            f"{prefix}.attn.out_proj.weight": (width, heads * head),
            f"{prefix}.ffn.proj_1.weight": (2 * ffn, width),
            f"{prefix}.ffn.proj_2.weight": (width, ffn),
            f"{prefix}.attn_norm.weight": (width,),
            f"{prefix}.ffn_norm.weight": (width,),
        }
    shapes["transformer.norm.weight"] = (width,)
    return shapes


def phi3_small_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Phi-3-small."""
    width, heads, kv_heads = fields["hidden_size"], fields["num_attention_heads"], fields["num_key_value_heads"]
    head = width // heads
    ffn = fields["ff_intermediate_size"] or fields["ff_dim_multiplier"] * (width // 3) * 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (fields["vocab_size"], width)}
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (fields["vocab_size"], width)
    norms = ["model.final_layernorm"]
    for i in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        for name, rows, columns in (
            ("self_attn.query_key_value", (heads + 2 * kv_heads) * head, width),
            ("self_attn.dense", width, heads * head),
            ("mlp.up_proj", 2 * ffn, width),
            ("mlp.down_proj", width, ffn),
        ):
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
    return shapes | {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}


# What a config of any family is shrunk to, where it has the field.
_TINY = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "intermediate_size": 96, "ffn_dim": 96, "num_hidden_layers": 3,
    "n_layer": 3, "n_layers": 3, "num_layers": 3, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 256, "n_positions": 256,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "dff": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "sliding_window": 12, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "word_embed_proj_dim": 64, "rotary_dim": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """A small config of any family of transformers; whatever its class raises when it does not shrink."""
    import transformers as hf

    config_class = hf.CONFIG_MAPPING[model_type]
    default = config_class()
    fields: dict[str, Any] = {}
    for name, value in _TINY.items():
        real = default.attribute_map.get(name, name)
        if hasattr(default, name) and not isinstance(getattr(config_class, real, None), property):
            fields.setdefault(real, value)
    if hasattr(default, "kv_lora_rank"):  # latent attention: a key of its own for each head
        fields.pop("head_dim", None)
        fields["num_key_value_heads"] = 4
    if getattr(default, "layer_types", None) is not None and not isinstance(
        getattr(config_class, "layer_types", None), property
    ):
        fields["layer_types"] = None  # as the class chooses them for the number of layers
    return config_class(**fields)


def other_types() -> list[str]:
    """Model types for which transformers has a causal language model, those of NAMED left out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = {model.model_type for model in NAMED.values()}
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in named)


def drawn(count: int, seed: int, usable: Callable[[str], bool]) -> list[str]:
    """``count`` of the other types, drawn by ``seed`` from those that are ``usable``."""
    order = other_types()
    random.Random(seed).shuffle(order)
    found: list[str] = []
    for name in order:
        if len(found) == count:
            break
        if usable(name):
            found.append(name)
    return found
