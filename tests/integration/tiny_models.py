"""Tiny random checkpoints in Hugging Face layout, and what transformers generates with them."""

from __future__ import annotations

from pathlib import Path

import torch

TIE_GAP = 1e-4


def build(kind: str, folder: Path, seed: int = 0, **changes) -> Path:
    """Saves a random model of one family; large weights, so that its tokens are far from uniform."""
    import transformers as hf

    shared = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320, "eos_token_id": 2}
    families = {
        "llama_mha": (hf.LlamaConfig, {"num_attention_heads": 4, "num_key_value_heads": 4}),
        "llama_gqa": (hf.LlamaConfig, {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}),
        "llama_tied": (hf.LlamaConfig, {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}),
        "llama_uneven": (hf.LlamaConfig, {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 96, "intermediate_size": 176, "vocab_size": 301}),
        "mistral": (hf.MistralConfig, {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "sliding_window": 7}),
        "qwen2": (hf.Qwen2Config, {"num_attention_heads": 8, "num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        # Everything unusual at once: biases everywhere, llama3 rope, several end tokens, bf16 in many files.
        "llama_odd": (hf.LlamaConfig, {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "vocab_size": 1001, "intermediate_size": 172, "eos_token_id": [2, 7], "max_position_embeddings": 512, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    }  # fmt: skip
    config_class, own = families[kind]
    config = config_class(**{**shared, **own, **changes})
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if kind == "llama_odd":
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="150KB")
    else:
        model.save_pretrained(folder)
    return folder


class Reference:
    """transformers' own greedy generation in fp32."""

    def __init__(self, folder: Path) -> None:
        import transformers as hf

        self.model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """New tokens, the end token left out."""
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_tokens, do_sample=False, pad_token_id=0,
            )[0].tolist()[len(prompt) :]  # fmt: skip
        eos = self.model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        return out[:-1] if out and out[-1] in ends else out

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """``[vocabulary]`` after the last token."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0, -1]

    def check(self, prompt: list[int], max_tokens: int, got: list[int]) -> None:
        """Equal tokens; a difference is forgiven, and printed, only at a tie of the reference's two best logits."""
        self.compare(prompt, got, self.generate(prompt, max_tokens))

    def check_greedy(self, prompt: list[int], got: list[int]) -> None:
        """Each of ``got`` is the best after those before it, or as good: all in one pass, where an end is not in question."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
        behind = logits.max(-1).values - logits.gather(-1, torch.tensor(got)[:, None])[:, 0]
        assert float(behind.max()) < TIE_GAP, f"token {int(behind.argmax())} of {prompt}: {got} (gap {behind.max()})"

    def compare(self, prompt: list[int], got: list[int], expected: list[int]) -> None:
        """As ``check``, with what the reference generated already."""
        if got == expected:
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
        )
        best = self.logits(prompt + expected[:at]).topk(2).values
        gap = float(best[0] - best[1])
        assert gap < TIE_GAP, f"token {at} of {prompt}: {got} instead of {expected} (gap {gap})"
        print(f"tie at token {at} of a prompt of {len(prompt)}: gap {gap:.1e}")
