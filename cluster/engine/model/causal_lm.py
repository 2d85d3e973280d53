"""A causal language model of transformers, built for one rank: its stage, its shard, loaded, with a paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cluster.checkpoint.layout import Checkpoint
from cluster.domain.errors import CheckpointError
from cluster.domain.parallel_layout import Stage
from cluster.engine.model import agreement, attention, families, pipeline, rotary, weights
from cluster.engine.model.conversion import Source, sources
from cluster.engine.model.shard_reads import shard_reads
from cluster.engine.model.sharding import ALL, Kept, layer_list, shard_model, vocabulary_sizes
from cluster.engine.model.tensor_parallel import TensorParallelGroup
from cluster.engine.step import StepPlan

_PROBE_ROWS = 3


class ShardedCausalLM:
    """One rank's part of a model; of its group all ranks call ``forward`` with the same plans, in order.

    Built in three steps, each of which can be long: ``__init__`` (meta only), ``load`` (bytes), ``make_cache``.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, group: TensorParallelGroup, stage: Stage
    ) -> None:
        attention.register()
        self._dtype, self._device, self._group, self._stage = dtype, device, group, stage
        self._config: Any = families.load_config(checkpoint.config)
        self._model: Any = families.build(self._config, dtype)
        self._base: Any = self._model.base_model
        head, embedding = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        self._tied = head.weight is embedding.weight
        names = {id(module): name for name, module in self._model.named_modules()}
        self._head_path, self._embedding_path = names[id(head)], names[id(embedding)]
        self._head_width = int(head.weight.shape[1])
        self._vocabulary_sizes = vocabulary_sizes(int(head.weight.shape[0]), group.size)
        self._sources = sources(self._model, checkpoint.tensors)
        self._layers_path = layers = layer_list(self._model)
        assert stage.layers.stop <= len(self._model.get_submodule(layers)), (stage, checkpoint.path)
        found = pipeline.trace(self._model, layers) if stage.count > 1 else None
        self._kept = shard_model(self._model, group.rank, group.size, group.process_group)
        own = families.attention_layers(self._model)[stage.layers.start : stage.layers.stop]
        self._attention = [(self._model.get_submodule(layer.name), layer) for layer in own]
        self._received = pipeline.Received()
        if found is not None:
            pipeline.keep_stage(self._model, layers, stage, found, self._received)
            if self._tied and stage.is_last:
                head.weight = self._head_rows("meta")
        self._rotary: rotary.Rotary | None = None
        self._tables: attention.BlockTables | None = None
        self._cache: attention.PagedKVCache | None = None
        self._logits: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def vocab_size(self) -> int:
        return sum(self._vocabulary_sizes)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that go from stage to stage."""
        return int(self._config.get_text_config().hidden_size)

    @property
    def parameter_bytes(self) -> int:
        """What this rank holds of the weights, stored buffers included."""
        stored = [buffer for name, buffer in self._model.named_buffers() if name in self._sources]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._model.parameters(), *stored))

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache of one token on this rank."""
        return int(sum(a.kv_heads * (a.key_dim + a.value_dim) for _, a in self._attention) * self._dtype.itemsize)

    def load(self, started: Callable[[int], None], progress: weights.Progress) -> None:
        """Reads this rank's slices. ``started`` is told the number of bytes to come, ``progress`` each part of them."""
        self._fill(started, progress)
        self._rotary = rotary.rebuild(self._model, self._device)
        held = (*self._model.named_parameters(), *self._model.named_buffers())
        left = [name for name, tensor in held if tensor.is_meta]
        assert not left, f"never loaded: {left}"
        del held  # whatever still names a weight here keeps it alive while the next line makes another of it
        if self._device.type == "cpu":
            self._prepare_cpu()
        if self._stage.is_last:
            self._logits = self._choose_head()

    def _fill(self, started: Callable[[int], None], progress: weights.Progress) -> None:
        reads = [read for name, target in self._materialised() for read in self._reads(name, target)]
        if self._stage.is_last and self._tied:
            reads += self._tie_head()
        started(weights.bytes_to_read(reads))
        weights.load(reads, progress, rank=self._group.rank, ranks=self._group.size)

    def make_cache(self, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int) -> None:
        """Allocates the KV pool, this rank's KV heads of its stage's layers, and the block tables."""
        layers = {
            module.layer_idx: attention.LayerKV(layer.kv_heads, layer.key_dim, layer.value_dim)
            for module, layer in self._attention
        }
        self._tables = attention.BlockTables(max_num_seqs, -(-max_model_len // block_size), self._device)
        self._cache = attention.PagedKVCache(layers, num_blocks, block_size, self._dtype, self._device)
        attention.install(self._base, self._cache)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, hidden: torch.Tensor | None = None) -> torch.Tensor | None:
        """Runs a step.

        ``hidden``: ``[tokens, hidden_size]`` from the stage before, None on the first. A stage that is not the last
        returns such a tensor, whole on every rank; of the last stage the first rank returns
        ``[sampled, vocabulary]`` logits in the order of the entries that sample, None when there are none, and the
        others None.
        """
        try:
            rows = self._last_hidden(plan, hidden)
        except pipeline.StageEnd as end:
            return end.hidden[0]
        if not len(rows):
            return None
        assert self._logits is not None
        return self._group.gather_columns(self._logits(rows), self._vocabulary_sizes)

    def _last_hidden(self, plan: StepPlan, hidden: torch.Tensor | None) -> torch.Tensor:
        """``[sampled, width]``, what the head takes."""
        cache, tables = self._cache, self._tables
        assert cache is not None
        assert tables is not None
        assert self._rotary is not None
        tables.apply(plan.entries)
        layout = attention.layout_step(plan.entries, tables, cache.block_size)
        cache.layout = layout
        self._rotary.begin(plan.entries)
        self._received.hidden = None if hidden is None else hidden[None]
        output = self._base(input_ids=layout.token_ids[None], position_ids=layout.positions[None], use_cache=False)
        rows: torch.Tensor = output.last_hidden_state[0]
        # As many as are sampled are these, in order: all are, or the last layer left the others out.
        return rows if len(rows) == len(layout.sampled) else rows[layout.sampled]

    def _materialised(self) -> list[tuple[str, torch.Tensor]]:
        """Gives every parameter and stored buffer real, uninitialised memory; (name, tensor) of each, once."""
        filled: list[tuple[str, torch.Tensor]] = []
        made: dict[int, nn.Parameter] = {}
        tied_head = f"{self._head_path}.weight" if self._tied else ""
        for path, module in self._model.named_modules():
            for name, parameter in list(module._parameters.items()):  # noqa: SLF001 - the way to replace one
                full = f"{path}.{name}" if path else name
                if parameter is None or full == tied_head:
                    continue
                if id(parameter) not in made:
                    target = torch.empty(parameter.shape, dtype=self._parameter_dtype(parameter), device=self._device)
                    made[id(parameter)] = nn.Parameter(target, requires_grad=False)
                    filled.append((full, target))
                module._parameters[name] = made[id(parameter)]  # noqa: SLF001
            for name, buffer in list(module._buffers.items()):  # noqa: SLF001
                full = f"{path}.{name}" if path else name
                if buffer is not None and full in self._sources and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=self._device)  # noqa: SLF001
                    filled.append((full, module._buffers[name]))  # noqa: SLF001
        return filled

    def _parameter_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        """Some families keep a few parameters in float32 whatever the model's type is."""
        return parameter.dtype if parameter.is_floating_point() else self._dtype

    def _reads(self, name: str, target: torch.Tensor) -> list[weights.ShardRead]:
        kept = self._kept.get(name, ALL)
        if kept.counts_once and self._group.rank > 0:
            target.zero_()
            return []
        return shard_reads(target, kept, self._sources_of(name))

    def _sources_of(self, name: str) -> tuple[Source, ...]:
        try:
            return self._sources[name]
        except KeyError:
            raise CheckpointError(
                f"The checkpoint lacks the tensor {name}; export the model again, completely."
            ) from None

    def _tie_head(self) -> list[weights.ShardRead]:
        """A tied head is a view of the embedding's rows; on a later stage, which has no embedding, it is read."""
        head = self._model.get_submodule(self._head_path)
        sizes, rank = self._vocabulary_sizes, self._group.rank
        first = sum(sizes[:rank])
        if self._stage.is_first:
            embedding = self._model.get_submodule(self._embedding_path).weight
            head.weight = nn.Parameter(embedding.detach()[first : first + sizes[rank]], requires_grad=False)
            return []
        head.weight = self._head_rows(self._device)
        kept = Kept(0, ((first, first + sizes[rank]),))
        return shard_reads(head.weight.detach(), kept, self._sources_of(f"{self._embedding_path}.weight"))

    def _head_rows(self, device: torch.device | str) -> nn.Parameter:
        shape = (self._vocabulary_sizes[self._group.rank], self._head_width)
        return nn.Parameter(torch.empty(shape, dtype=self._dtype, device=device), requires_grad=False)

    def _prepare_cpu(self) -> None:
        from cluster.engine.model import cpu, last_layer

        cpu.prepare(self._base, self._group)
        if not self._stage.is_last:
            return
        head = self._model.get_submodule(self._head_path)
        if not self._tied and type(head) is nn.Linear:
            parent, _, child = self._head_path.rpartition(".")
            product = _Head(cpu.head_product(head.weight.detach()), head.bias)
            setattr(self._model.get_submodule(parent), child, product)
        own = self._model.get_submodule(self._layers_path)[self._stage.layers.start : self._stage.layers.stop]
        last_layer.prune(own, self._try_out, cpu.unanimous(self._group))

    @torch.inference_mode()
    def _try_out(self, plans: Sequence[StepPlan]) -> list[torch.Tensor]:
        """The last hidden states of ``plans``, from random ones on a later stage, in a small cache of their own."""
        from cluster.engine.model import last_layer

        self.make_cache(last_layer.BLOCKS, last_layer.BLOCK_SIZE, last_layer.SEQUENCES, last_layer.LONGEST)
        try:
            return [
                self._last_hidden(
                    plan,
                    None
                    if self._stage.is_first
                    else agreement.random(plan.num_tokens, self.hidden_size, dtype=self._dtype),
                )
                for plan in plans
            ]
        finally:
            self._cache = self._tables = None

    def _choose_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """``[rows, hidden]`` -> this rank's columns of the logits.

        By the family's own forward, with its base model standing for the rows that were computed already: some scale
        or cap their logits. Where that changes nothing, which is most families, the head alone is called.
        """
        head, rows = self._model.get_submodule(self._head_path), _Rows(self._base)
        path = next(name for name, module in self._model.named_modules() if module is self._base)
        assert path, type(self._model).__name__
        setattr(self._model, path, rows)

        def own_forward(hidden: torch.Tensor) -> torch.Tensor:
            rows.hidden = hidden[None]
            logits: torch.Tensor = self._model(input_ids=_NO_TOKENS, use_cache=False).logits[0]
            return logits

        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(_PROBE_ROWS, self._head_width, generator=generator).to(self._device, self._dtype)
        with torch.inference_mode():
            plain = torch.equal(own_forward(sample), head(sample))
        return head if plain else own_forward


_NO_TOKENS = torch.zeros(1, 1, dtype=torch.long)


class _Head(nn.Module):
    """A head whose product is made elsewhere."""

    def __init__(self, product: Callable[[torch.Tensor], torch.Tensor], bias: torch.Tensor | None) -> None:
        super().__init__()
        self._product, self._bias = product, bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._product(hidden)
        return logits if self._bias is None else logits + self._bias


class _Output:
    """What a base model returns, of which only the last hidden states are there."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _Rows(nn.Module):
    """Stands in for a base model: gives the rows it was given; so do the decoders that some have inside."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        self._of = (base,)  # not as a child

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)
        value = getattr(self._of[0], name)
        return self if isinstance(value, nn.Module) else value

    def forward(self, *_: Any, **__: Any) -> _Output:
        assert self.hidden is not None
        return _Output(self.hidden)
