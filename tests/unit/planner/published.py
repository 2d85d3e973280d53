"""Published configurations (facts only), with the parameter counts their makers give or their shapes imply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """``kv_bytes``: KV cache of one token in bfloat16; ``in_transformers``: transformers has the class."""

    config: dict[str, Any]
    parameters: int
    kv_bytes: int
    context: int
    in_transformers: bool = True


def _llama(hidden: int, layers: int, heads: int, kv: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": ffn, "vocab_size": 32000, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    } | more  # fmt: skip


_LLAMA3 = {
    "vocab_size": 128256,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA31 = _LLAMA3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def _falcon(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_kv_heads": 8, "vocab_size": 65024,
        "new_decoder_architecture": True, "parallel_attn": True, "bias": False, "alibi": False,
        "torch_dtype": "bfloat16", "eos_token_id": 11,
    }  # fmt: skip


def _phi3(hidden: int, layers: int, heads: int, kv: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": ffn, "vocab_size": 32064,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "sliding_window": 2047, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    } | more  # fmt: skip


def _phi3_128k(hidden: int, layers: int, heads: int, kv: int, ffn: int) -> dict[str, Any]:
    """The factors are made up: they change no shape."""
    factors = [1.0 + i / 10 for i in range(hidden // heads // 2)]
    rope = {"type": "longrope", "short_factor": factors, "long_factor": [4 * factor for factor in factors]}
    return _phi3(hidden, layers, heads, kv, ffn, max_position_embeddings=131072, rope_scaling=rope)


def _openelm(model_dim: int, layers: int, head_dim: int) -> dict[str, Any]:
    return {
        "architectures": ["OpenELMForCausalLM"], "model_type": "openelm", "model_dim": model_dim,
        "num_transformer_layers": layers, "head_dim": head_dim, "num_gqa_groups": 4, "qkv_multipliers": [0.5, 1.0],
        "ffn_multipliers": [0.5, 4.0], "ffn_dim_divisor": 256, "vocab_size": 32000, "max_context_length": 2048,
        "share_input_output_layers": True, "normalize_qk_projections": True, "torch_dtype": "bfloat16",
    }  # fmt: skip


# Those that differ in shape: Llama 2 13B is Llama 1's with a longer context, Llama 3 70B is 3.1's with a shorter one,
# Vicuna v1.3 (7B, 13B, 33B) has the configs of Llama 1 and Vicuna v1.5 those of Llama 2.
PUBLISHED: dict[str, Published] = {
    "llama-7b": Published(_llama(4096, 32, 32, 32, 11008), 6_738_415_616, 524_288, 2048),
    "llama-13b": Published(_llama(5120, 40, 40, 40, 13824), 13_015_864_320, 819_200, 2048),
    "llama-33b": Published(_llama(6656, 60, 52, 52, 17920), 32_528_943_616, 1_597_440, 2048),
    "llama-65b": Published(_llama(8192, 80, 64, 64, 22016), 65_285_660_672, 2_621_440, 2048),
    "llama-2-7b": Published(
        _llama(4096, 32, 32, 32, 11008, max_position_embeddings=4096), 6_738_415_616, 524_288, 4096
    ),
    "llama-2-70b": Published(
        _llama(8192, 80, 64, 8, 28672, max_position_embeddings=4096), 68_976_648_192, 327_680, 4096
    ),
    "llama-3-8b": Published(
        _llama(4096, 32, 32, 8, 14336, **_LLAMA3, max_position_embeddings=8192), 8_030_261_248, 131_072, 8192
    ),
    "llama-3.1-70b": Published(_llama(8192, 80, 64, 8, 28672, **_LLAMA31), 70_553_706_496, 327_680, 131072),
    "llama-3.1-405b": Published(_llama(16384, 126, 128, 8, 53248, **_LLAMA31), 405_853_388_800, 516_096, 131072),
    "alpaca-7b": Published(_llama(4096, 32, 32, 32, 11008, vocab_size=32001), 6_738_423_808, 524_288, 2048),
    "vicuna-7b-v1.5-16k": Published(
        _llama(4096, 32, 32, 32, 11008, max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 4.0}),
        6_738_415_616,
        524_288,
        16384,
    ),
    "falcon-40b": Published(_falcon(8192, 60, 128), 41_303_293_952, 122_880, 2048),
    "falcon-180b": Published(_falcon(14848, 80, 232), 178_557_088_768, 163_840, 2048),
    "mpt-30b": Published(
        {
            "architectures": ["MPTForCausalLM"],
            "model_type": "mpt",
            "d_model": 7168,
            "n_layers": 48,
            "n_heads": 64,
            "vocab_size": 50432,
            "max_seq_len": 8192,
            "expansion_ratio": 4,
            "no_bias": True,
            "attn_config": {"alibi": True, "attn_type": "multihead_attention"},
            "torch_dtype": "bfloat16",
        },
        29_957_200_896,
        1_376_256,
        8192,
    ),
    "phi-3-mini": Published(_phi3(3072, 32, 32, 32, 8192), 3_821_079_552, 393_216, 4096),
    "phi-3-medium": Published(_phi3(5120, 40, 40, 10, 17920), 13_960_238_080, 204_800, 4096),
    "phi-3-mini-128k": Published(_phi3_128k(3072, 32, 32, 32, 8192), 3_821_079_552, 393_216, 131072),
    "phi-3-medium-128k": Published(_phi3_128k(5120, 40, 40, 10, 17920), 13_960_238_080, 204_800, 131072),
    "phi-3-small": Published(
        {
            "architectures": ["Phi3SmallForCausalLM"],
            "model_type": "phi3small",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "ff_intermediate_size": 14336,
            "vocab_size": 100352,
            "max_position_embeddings": 8192,
            "torch_dtype": "bfloat16",
        },
        7_392_272_384,
        131_072,
        8192,
        in_transformers=False,
    ),
    "openelm-270m": Published(_openelm(1280, 16, 64), 271_527_168, 16_128, 2048, in_transformers=False),
    "openelm-450m": Published(_openelm(1536, 20, 64), 457_179_136, 23_296, 2048, in_transformers=False),
    "openelm-1.1b": Published(_openelm(2048, 28, 64), 1_079_891_456, 43_264, 2048, in_transformers=False),
    "openelm-3b": Published(_openelm(3072, 36, 128), 3_036_647_424, 83_968, 2048, in_transformers=False),
}
