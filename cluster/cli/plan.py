"""``llm-cluster plan``: how a model would be laid out, without starting anything."""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.layout import CONFIG_FILE, Checkpoint, read_checkpoint, read_config, read_generation_config
from cluster.checkpoint.resolve import ResolvedModel, demo_path, fetch_config, resolve
from cluster.checkpoint.rope_scaling import stretched, stretched_config
from cluster.checkpoint.validate import check_tensors, stored_dtype
from cluster.config.schema import ModelConfig
from cluster.domain.errors import ConfigError, NoFeasiblePlan
from cluster.domain.hardware import Inventory, cpu_device, device_type, uniform_inventory
from cluster.domain.model_spec import ModelSpec
from cluster.planner.helm_values import Source, render_helm_values
from cluster.planner.plan import plan
from cluster.planner.render import no_plan_to_json, plan_to_json, render_no_plan, render_plan

_LAYOUT, _HARDWARE, _LIMITS = "Layout", "Machines", "Limits"


class Output(enum.StrEnum):
    """What is printed: for people, for programs, or values of the Helm chart."""

    TEXT = "text"
    JSON = "json"
    HELM = "helm"


def plan_command(
    model: Annotated[str, typer.Argument(help="Directory, config.json, hub id, or demo.")],
    nodes: Annotated[int | None, typer.Option(min=1, max=10_000, rich_help_panel=_HARDWARE)] = None,
    devices_per_node: Annotated[int | None, typer.Option(min=1, max=1024, rich_help_panel=_HARDWARE)] = None,
    device: Annotated[
        str | None, typer.Option(help="Device type: h100, a100, ... or cpu.", rich_help_panel=_HARDWARE)
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", min=1, rich_help_panel=_LAYOUT)
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option("--pipeline-parallel-size", "-pp", min=1, rich_help_panel=_LAYOUT)
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=10_000, rich_help_panel=_LAYOUT)] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_LIMITS)] = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=1, rich_help_panel=_LIMITS)] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, rich_help_panel=_LIMITS)] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, rich_help_panel=_LIMITS)] = None,
    rope_scaling: Annotated[
        str | None,
        typer.Option(help="Stretch the context: TYPE:FACTOR (linear:2) or a JSON object.", rich_help_panel=_LIMITS),
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, rich_help_panel=_LIMITS)] = None,
    device_memory_utilization: Annotated[float | None, typer.Option(rich_help_panel=_LIMITS)] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    output: Annotated[Output, typer.Option(help="For people, programs, or values of the Helm chart.")] = Output.TEXT,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --output json.")] = False,
) -> None:
    """Show layout, placement, per-rank bytes and expected speed; or every reason why not (exit 2)."""
    config = _model_config(
        model=model,
        revision=revision,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        rope_scaling=rope_scaling,
        block_size=block_size,
        device_memory_utilization=device_memory_utilization,
    )
    spec, checkpoint, source = _read_model(model, revision, config.rope_scaling)
    inventory = _inventory(nodes, devices_per_node, device)
    stored = checkpoint.nbytes_by_name if checkpoint else None
    try:
        result = plan(spec, config, inventory, replicas=replicas, weights_nbytes_by_name=stored)
    except NoFeasiblePlan as error:
        if as_json or output is Output.JSON:
            print(json.dumps(no_plan_to_json(error), indent=2))
        else:  # values go to a file, so what is no value goes elsewhere
            Console(soft_wrap=False, stderr=output is Output.HELM).print(render_no_plan(error))
        raise typer.Exit(2) from None
    if as_json or output is Output.JSON:
        print(json.dumps(plan_to_json(result), indent=2))
    elif output is Output.HELM:
        print(render_helm_values(result, config, source), end="")
    else:
        Console(soft_wrap=False).print(render_plan(result))


def _model_config(**values: Any) -> ModelConfig:
    """The options that were given; the schema's defaults hold for the others."""
    try:
        return ModelConfig.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{option} {first['input']!r} is not allowed: {reason}.") from None


def _read_model(
    model: str, revision: str | None, rope_scaling: str | None
) -> tuple[ModelSpec, Checkpoint | None, Source]:
    """The model's shape; its checkpoint too when the weights are here; where others find it."""
    path, resolved = Path(model).expanduser(), None
    if not path.is_file():
        resolved = resolve(model, revision)
        path = fetch_config(resolved)
    if path.is_dir() and any(path.glob("*.safetensors")):
        checkpoint = stretched(read_checkpoint(path), rope_scaling)
        spec = model_spec(
            checkpoint.config,
            checkpoint.generation_config,
            stored_dtype=stored_dtype(checkpoint),
            tensors=checkpoint.tensors,
        )
        check_tensors(checkpoint, spec)
        return spec, checkpoint, _source(resolved, path, checkpoint.total_bytes)
    directory = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix != ".json":
        raise ConfigError(f"{model} is no {CONFIG_FILE}; give a directory in Hugging Face layout or its config.json.")
    spec = model_spec(stretched_config(read_config(path), rope_scaling), read_generation_config(directory))
    return spec, None, _source(resolved, directory, 0)


def _source(resolved: ResolvedModel | None, directory: Path, stored_bytes: int) -> Source:
    if resolved is None:
        return Source(directory.resolve().name, stored_bytes=stored_bytes)
    return Source(
        resolved.name,
        repo_id=resolved.repo_id or "",
        commit=resolved.commit or "",
        demo=resolved.path is not None and resolved.path == demo_path(),
        stored_bytes=stored_bytes,
    )


def _inventory(nodes: int | None, devices_per_node: int | None, device: str | None) -> Inventory:
    """The machines that were named; without any, this one: its cores as CPU slots that share its memory."""
    if nodes is None and devices_per_node is None and device is None:
        return _this_machine(1, os.cpu_count() or 1)
    count = devices_per_node or (os.cpu_count() or 1 if device in (None, "cpu") else 8)
    if device in (None, "cpu"):
        return _this_machine(nodes or 1, count)
    return uniform_inventory(nodes or 1, count, device_type(str(device)))


def _this_machine(nodes: int, slots: int) -> Inventory:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return uniform_inventory(nodes, slots, cpu_device(memory // slots))
