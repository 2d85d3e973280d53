"""What one engine can take, and why a sequence can never run in it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.domain.model_spec import RopeByLength
from cluster.engine.block_pool import BlockPool
from cluster.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one engine.

    ``max_num_seqs`` run at once, ``max_num_batched_tokens`` are computed in a step. ``max_num_waiting`` bounds the
    sequences that have not started, ``max_waiting_prompt_tokens`` their tokens (a single one may exceed it); started
    ones (preempted, or resumed from another replica, which the routers bound) wait besides. ``max_model_len`` counts
    prompt and output. ``vocab_size`` bounds every token id. ``rope_by_length``: how the model's rotary embeddings
    depend on a sequence's length, where they do.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    max_model_len: int
    max_preemptions: int = 4
    vocab_size: int = 2**31
    max_waiting_prompt_tokens: int = 2**31
    rope_by_length: RopeByLength | None = None

    def __post_init__(self) -> None:
        assert min(self.max_num_seqs, self.max_num_batched_tokens, self.max_num_waiting) >= 1, self
        assert self.max_waiting_prompt_tokens >= 1, self
        assert self.max_model_len >= 2, self
        assert self.max_preemptions >= 0, self

    def max_length(self, sequence: Sequence) -> int:
        """Known tokens at which the sequence has all the output it asked for, or fills the model's length."""
        return min(len(sequence.prompt_token_ids) + sequence.params.max_tokens, self.max_model_len)

    @property
    def switch_length(self) -> int | None:
        """The known tokens of a sequence from which on its past is computed anew; None: no such length."""
        rope = self.rope_by_length
        return rope.original_len + 1 if rope is not None and rope.kind == "switch" else None

    def overflow(self, sequence: Sequence, num_waiting: int, num_waiting_tokens: int) -> str:
        """Why a sequence that has not started cannot wait beside so many others; empty when it can."""
        if num_waiting >= self.max_num_waiting:
            return (
                f"{num_waiting} requests wait already, as many as max_num_waiting allows; "
                "try again later, or add a replica."
            )
        if num_waiting and num_waiting_tokens + sequence.num_tokens > self.max_waiting_prompt_tokens:
            return (
                f"Prompts of {num_waiting_tokens} tokens wait already, and with {sequence.num_tokens} more they exceed "
                f"max_waiting_prompt_tokens {self.max_waiting_prompt_tokens}; try again later, or add a replica."
            )
        return ""

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
        computed = self.max_length(sequence) - 1
        if pool.blocks_for(computed) > pool.num_blocks:
            room = pool.num_blocks * pool.block_size + 1
            return (
                f"Prompt and max_tokens come to {computed + 1} tokens; shorten them to {room}, what the KV cache holds."
            )
        return ""

    def _outside_vocabulary(self, sequence: Sequence) -> int | None:
        """One token id that would break every rank's embedding lookup, if there is any."""
        largest = max((*sequence.prompt_token_ids, *sequence.generated_token_ids, *sequence.params.logit_bias))
        return largest if largest >= self.vocab_size else None
