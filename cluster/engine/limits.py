"""What one engine can take, and why a sequence can never run in it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.engine.block_pool import BlockPool
from cluster.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one engine.

    ``max_num_seqs`` run at once, ``max_num_batched_tokens`` are computed in a step. ``max_num_waiting`` bounds the
    sequences that have not started; started ones (preempted, or resumed from another replica, which the routers
    bound) wait besides. ``max_model_len`` counts prompt and output. ``vocab_size``
    bounds every token id.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    max_model_len: int
    max_preemptions: int = 4
    vocab_size: int = 2**31

    def __post_init__(self) -> None:
        assert min(self.max_num_seqs, self.max_num_batched_tokens, self.max_num_waiting) >= 1, self
        assert self.max_model_len >= 2, self
        assert self.max_preemptions >= 0, self

    def is_complete(self, sequence: Sequence) -> bool:
        """Whether the sequence has all the output it asked for, or fills the model's length."""
        return (
            len(sequence.generated_token_ids) >= sequence.params.max_tokens or sequence.num_tokens >= self.max_model_len
        )

    def _outside_vocabulary(self, sequence: Sequence) -> int | None:
        """One token id that would break every rank's embedding lookup, if there is any."""
        largest = max((*sequence.prompt_token_ids, *sequence.generated_token_ids, *sequence.params.logit_bias))
        return largest if largest >= self.vocab_size else None

    def fault(self, sequence: Sequence, pool: BlockPool) -> str:
        """Why a sequence can never run here, in a sentence that names the fix; empty when it can."""
        longest = self.max_model_len
        num_prompt = len(sequence.prompt_token_ids)
        if num_prompt == 0:
            return "The prompt is empty; send at least one token."
        strange = self._outside_vocabulary(sequence)
        if strange is not None:
            return f"Token {strange} is outside the vocabulary of {self.vocab_size}; send ids below that."
        if num_prompt >= longest:
            return (
                f"The prompt has {num_prompt} tokens; shorten it to at most {longest - 1}, the model's length less one."
            )
        if sequence.num_tokens > longest:
            return f"Prompt and output have {sequence.num_tokens} tokens; the model's length allows {longest} at most."
        # The last token of all is reported and never computed.
        computed = min(num_prompt + sequence.params.max_tokens, longest) - 1
        if pool.blocks_for(computed) > pool.num_blocks:
            room = pool.num_blocks * pool.block_size + 1
            return (
                f"Prompt and max_tokens come to {computed + 1} tokens; shorten them to {room}, what the KV cache holds."
            )
        return ""
