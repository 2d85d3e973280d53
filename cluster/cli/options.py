"""Options of a model's engine, and of a request: named and explained once for every command that takes them."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.wire.caller import SESSION_KEY, TENANT_KEY

_LAYOUT, _ENGINE = "Layout", "Engine"

Replicas = Annotated[int | None, typer.Option(min=1, rich_help_panel=_LAYOUT)]
TensorParallelSize = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "-tp", min=1, rich_help_panel=_LAYOUT)
]
PipelineParallelSize = Annotated[
    int | None, typer.Option("--pipeline-parallel-size", "-pp", min=1, rich_help_panel=_LAYOUT)
]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel=_ENGINE)]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_ENGINE)]
MaxModelLen = Annotated[int | None, typer.Option(min=2, rich_help_panel=_ENGINE)]
MaxNumSeqs = Annotated[int | None, typer.Option(min=1, rich_help_panel=_ENGINE)]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(min=1, rich_help_panel=_ENGINE)]
MaxNumWaiting = Annotated[
    int | None, typer.Option(min=1, help="Requests that wait in an engine.", rich_help_panel=_ENGINE)
]
MaxWaitingPromptTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens of the prompts that wait there.", rich_help_panel=_ENGINE)
]
EnablePrefixCaching = Annotated[
    bool | None, typer.Option(help="Keep KV blocks of past prompts; the default.", rich_help_panel=_ENGINE)
]
RopeScaling = Annotated[
    str | None,
    typer.Option(help="Stretch the context: TYPE:FACTOR (linear:2) or a JSON object.", rich_help_panel=_ENGINE),
]
LoadFormat = Annotated[
    str | None, typer.Option(help="auto, or dummy: weights made up, none read.", rich_help_panel=_ENGINE)
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of dummy weights.", rich_help_panel=_ENGINE)]
BlockSize = Annotated[int | None, typer.Option(min=1, help="Tokens of a KV block.", rich_help_panel=_ENGINE)]
KvCacheBytes = Annotated[int | None, typer.Option(min=1, rich_help_panel=_ENGINE)]
DeviceMemoryUtilization = Annotated[float | None, typer.Option(rich_help_panel=_ENGINE)]
ServedModelName = Annotated[str | None, typer.Option(help="What clients call it.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub id.")]

Priority = Annotated[
    int,
    typer.Option(
        min=-(2**31), max=2**31 - 1, help="Higher goes first; below 0 is batch work, which waits for all others."
    ),
]
Tenant = Annotated[str, typer.Option(help=f"Whom the request is counted for, as metadata {TENANT_KEY}.")]
SessionId = Annotated[str, typer.Option(help=f"The conversation it belongs to, as metadata {SESSION_KEY}.")]
