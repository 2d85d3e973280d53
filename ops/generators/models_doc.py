"""docs/models.md: which families are served in which layouts, from what the tests saw (docs/models.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = "docs/models.md"
SEEN = Path(__file__).resolve().parents[2] / "docs" / "models.json"
HEAD = """\
# Models

Written by `ops/generate` from `docs/models.json`, which holds what `tests/integration/test_families.py` saw; that test
fails when the two differ. A tiny random checkpoint of each family runs in five layouts of tensor-parallel ranks (TP)
and pipeline stages (PP), in float32 on CPUs: five prompts in one continuous batch, in an engine so narrow that prompts
are computed in chunks, a sequence is preempted and blocks are found in the prefix cache.

**exact**: every token equals what `generate` of transformers {transformers} makes of the same prompt alone. (OpenELM
and Phi-3-small, which transformers does not have, are compared with plain forwards written in the test.) A difference
counts unless the reference's two best logits are closer than 1e-4 there. Numbers refer to the refusals below the table.
"""
DRAWN = """\
The last {count} rows were drawn at random (seed {seed}) from the other families for which transformers has a causal
language model and whose config can be shrunk for a test; none of them has a line of code here.
"""
TAIL = """\
## What is served

Any decoder-only model that transformers builds whose layers are attention and feed-forward: multi-head, grouped or
latent attention, sliding windows, sinks, soft caps, ALiBi, experts, tied heads. Before a byte is read the engine runs
the model on meta (shapes without numbers) and looks at every attention call. It refuses, in a sentence, and never
serves wrongly:

- a layer whose attention does not reach the paged attention exactly once (Mamba, RWKV, linear attention, Differential
  Llama), or that mixes tokens in a convolution beside it (Falcon-H1, LFM2, Qwen3-Next);
- a mask that is neither causal nor a sliding window (Llama 4's chunks, encoders such as BERT, sparse attention such as
  DeepSeek-V3.2's and Doge's);
- a model of which transformers' own cache forgets tokens that its attention would see (Moshi);
- an encoder with a decoder, and a checkpoint whose architecture exists only as code in its own directory. `auto_map` is
  passed over where transformers or this repository has the architecture; code from a checkpoint never runs;
- quantised checkpoints, and tensors stored in a form that cannot be read in place.

Falcon, MPT, BLOOM, GPT-J, CodeGen, GPT-Neo and GPT-NeoX-Japanese have attention code of their own in transformers; a
few lines in `cluster/engine/model/families.py` put the paged attention in its place. OpenELM and Phi-3-small are in
this repository (`openelm.py` and `phi3_small.py` in `cluster/engine/model`); Phi-3-small's block-sparse layers run on
the torch attention kernel, which masks what a head does not see and does not skip it.

More ranks than KV heads: each KV head is held by several ranks, and none is idle. More ranks than query heads, or more
stages than layers, is refused by the planner, and so is tensor parallelism for a model whose attention cannot be cut by
heads.

## Positions

`default`, `linear`, `dynamic`, `llama3`, `yarn` and `longrope` are served, past the original length too; frequencies
stay in float32 whatever the weights are. Where they depend on a sequence's length (`dynamic`, `longrope`) each sequence
has those it would have alone, whatever shares its batch.

## What has not been run

Nothing on this page has been run on a GPU: the CUDA attention backend, CUDA graphs and bfloat16 on a GPU have not been
run. The contract tests of attention and sampler take a GPU where there is one. The table is float32 on CPUs, and of
tiny models; published shapes are checked on meta only.
"""


def files() -> dict[str, str]:
    return {PATH: page(json.loads(SEEN.read_text()))}


def page(seen: dict[str, Any]) -> str:
    drawn = [name for name in seen["families"] if name in seen["drawn"]]
    named = [name for name in seen["families"] if name not in seen["drawn"]]
    refusals: list[str] = []
    table = _table(seen, named + drawn, refusals)
    parts = [HEAD.format(transformers=seen["transformers"]), table]
    if refusals:
        parts.append("\n".join(f"{number}. {sentence}" for number, sentence in enumerate(refusals, 1)) + "\n")
    parts += [DRAWN.format(count=len(drawn), seed=seen["seed"]), TAIL]
    return "\n".join(parts)


def _table(seen: dict[str, Any], names: list[str], refusals: list[str]) -> str:
    """Markdown; refusals are numbered as they come."""
    layouts = list(next(iter(seen["families"].values()))["results"])
    lines = ["| family | `model_type` | " + " | ".join(layouts) + " |", "| --- | --- |" + " --- |" * len(layouts)]
    for name in names:
        row = seen["families"][name]
        cells = [_cell(row["results"][layout], refusals) for layout in layouts]
        title = row["title"] if row["title"] != row["model_type"] else f"`{name}`"
        lines.append(f"| {title} | `{row['model_type']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(result: str, refusals: list[str]) -> str:
    if result == "exact":
        return "exact"
    if result not in refusals:
        refusals.append(result)
    return f"refused ({refusals.index(result) + 1})"
