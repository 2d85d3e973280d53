"""Real tokenizers of a few hundred tokens, trained on the spot."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = (
    "The quick brown fox jumps over the lazy dog. Ends here. STOP now, or stop later!",
    "Grüße aus Köln: 한국어 텍스트, 日本語のテキスト, emoji 👩‍👩‍👧 and 🎉🎉, e\u0301.",
    "def f(x):\n    return x ** 2\n\n\tif x:\n        pass",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "<|{{ message.role }}|>{{ message.content }}</s>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:1] * 4 + TEXTS[2:], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: a normalizer that writes spaces as ▁, and bytes for whatever is not in the vocabulary."""
    specials = ["<unk>", "<s>", "</s>"]
    letters = sorted(set("".join(TEXTS[::2])) | {"▁"})
    pieces = ["▁the", "▁fox", "the", "▁q", "op", "ST", "er", "▁▁", "한", "日", "\ufffd"]
    words = specials + [f"<0x{b:02X}>" for b in range(256)] + letters + pieces
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    merges = [("S", "T"), ("o", "p"), ("e", "r"), ("▁", "q"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(specials)
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


def files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What a checkpoint's directory would hold."""
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "chat_template": CHAT_TEMPLATE,
    }
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
