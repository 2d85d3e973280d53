"""A causal language model of transformers, built for one rank: sharded, loaded, with a paged KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cluster.checkpoint.layout import Checkpoint
from cluster.engine.model import attention, weights
from cluster.engine.model.tensor_parallel import Shard, TensorParallelGroup, shard_layers, shard_sizes
from cluster.engine.step import StepEntry


class ShardedCausalLM:
    """One rank's part of a model; of its group all ranks call ``forward`` with the same entries.

    Built in three steps, each of which can be long: ``__init__`` (meta only), ``load`` (bytes), ``make_cache``.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, group: TensorParallelGroup
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        attention.register()
        self._checkpoint, self._dtype, self._device, self._group = checkpoint, dtype, device, group
        self._config: Any = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=False)
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(
                self._config, dtype=dtype, attn_implementation=attention.IMPLEMENTATION
            )
        self._model.eval()
        self._base: Any = self._model.base_model
        self._shards = shard_layers(self._model, self._config, group)
        head = self._model.get_output_embeddings()
        self._tied = head.weight is self._model.get_input_embeddings().weight
        self._vocabulary_sizes = shard_sizes(self._config.vocab_size, self._config, group, "lm_head")
        self._head: torch.Tensor | None = None
        self._cache: attention.PagedKVCache | None = None

    @property
    def vocab_size(self) -> int:
        return int(self._config.vocab_size)

    def load(self, started: Callable[[int], None], progress: weights.Progress) -> None:
        """Reads this rank's slices. ``started`` is told the number of bytes to come, ``progress`` each part of them."""
        reads = [self._read(name, parameter) for name, parameter in self._materialised()]
        if not self._tied:
            reads.append(self._read_head())
        started(weights.bytes_to_read(reads))
        weights.load(reads, progress)
        if self._tied:
            first = sum(self._vocabulary_sizes[: self._group.rank])
            count = self._vocabulary_sizes[self._group.rank]
            self._head = self._model.get_input_embeddings().weight[first : first + count]
        self._rebuild_rotary_embeddings()
        left = [name for name, t in (*self._base.named_parameters(), *self._base.named_buffers()) if t.is_meta]
        assert not left, f"never loaded: {left}"

    def make_cache(self, num_blocks: int, block_size: int) -> None:
        """Allocates the KV pool: this rank's KV heads of every layer."""
        config = self._config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        columns = shard_sizes(kv_heads * head_dim, config, self._group, "self_attn.k_proj")[self._group.rank]
        self._cache = attention.PagedKVCache(
            config.num_hidden_layers, num_blocks, block_size, columns // head_dim, head_dim, self._dtype, self._device
        )
        attention.install(self._base, self._cache)

    @torch.inference_mode()
    def forward(self, entries: tuple[StepEntry, ...]) -> torch.Tensor | None:
        """Runs a step. Rank 0 gets ``[sampled entries, vocabulary]`` logits, in order; the others None."""
        cache = self._cache
        assert cache is not None
        token_ids = [token for entry in entries for token in entry.token_ids]
        positions = [p for entry in entries for p in range(entry.start, entry.start + len(entry.token_ids))]
        cache.layout = attention.layout_step(entries, cache.block_size, self._device, cache.slice_blocks)
        hidden = self._base(
            input_ids=torch.tensor([token_ids], dtype=torch.long, device=self._device),
            position_ids=torch.tensor([positions], dtype=torch.long, device=self._device),
            use_cache=False,
        ).last_hidden_state[0]
        rows = _sampled_rows(entries)
        if not rows:
            return None
        assert self._head is not None
        local = functional.linear(hidden[torch.tensor(rows, device=self._device)], self._head)
        return self._group.gather_columns(local, self._vocabulary_sizes)

    def _materialised(self) -> list[tuple[str, torch.Tensor]]:
        """Gives every parameter of the body real, uninitialised memory; (full name, tensor) of each."""
        filled = []
        prefix = self._model.base_model_prefix
        for module_name, module in self._base.named_modules():
            for name, parameter in list(module._parameters.items()):  # noqa: SLF001 - the way to replace one
                if parameter is None or not parameter.is_meta:
                    continue
                target = torch.empty(parameter.shape, dtype=self._dtype, device=self._device)
                module._parameters[name] = nn.Parameter(target, requires_grad=False)  # noqa: SLF001
                filled.append((".".join(part for part in (prefix, module_name, name) if part), target))
        return filled

    def _read(self, name: str, target: torch.Tensor) -> weights.ShardRead:
        header = weights.require(self._checkpoint.tensors, name)
        return weights.ShardRead(target, header, self._shards[name])

    def _read_head(self) -> weights.ShardRead:
        sizes, rank = self._vocabulary_sizes, self._group.rank
        first = sum(sizes[:rank])
        self._head = torch.empty(sizes[rank], self._config.hidden_size, dtype=self._dtype, device=self._device)
        header = weights.require(self._checkpoint.tensors, "lm_head.weight")
        return weights.ShardRead(self._head, header, Shard(0, ((first, first + sizes[rank]),)))

    def _rebuild_rotary_embeddings(self) -> None:
        """inv_freq is in no checkpoint and was built on meta; it must be float32 whatever the weights are."""
        for name, module in list(self._base.named_modules()):
            if type(module).__name__.endswith("RotaryEmbedding"):
                parent, _, attribute = name.rpartition(".")
                setattr(self._base.get_submodule(parent), attribute, type(module)(config=self._config).to(self._device))


def _sampled_rows(entries: tuple[StepEntry, ...]) -> list[int]:
    """Indices in the step of the last tokens of the entries to sample."""
    rows, first = [], 0
    for entry in entries:
        first += len(entry.token_ids)
        if entry.sample:
            rows.append(first - 1)
    return rows
