"""What of Phi-3-small follows from its config alone, as in the published configuration class and tokenizer."""

from __future__ import annotations

from cluster.checkpoint.fields import Fields

_PUBLISHED_VOCABULARY = 100_352
# Of its last ids, those with a meaning: end of text, system, user, assistant, end.
_SPECIAL = frozenset({100_257, 100_261, 100_262, 100_263, 100_266})


def ffn_size(fields: Fields) -> int:
    """Inner width of the feed-forward blocks: given, or by the multiplier (times 2/3, as it is gated)."""
    multiplier = fields.optional_whole("ff_dim_multiplier", None)
    if multiplier is None:
        return fields.whole("ff_intermediate_size", 14336)
    size = multiplier * (fields.whole("hidden_size", 4096) // 3) * 2
    return -(-size // 256) * 256 if fields.flag("gegelu_pad_to_256", True) else size


def unused_tokens(vocab_size: int) -> tuple[int, ...]:
    """Ids that stand for nothing and are never generated: what pads the published vocabulary, and a few in it."""
    if vocab_size != _PUBLISHED_VOCABULARY:
        return ()
    return tuple(token for token in range(100_256, vocab_size) if token not in _SPECIAL)
