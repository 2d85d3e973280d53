"""`llm-cluster generate`: one completion, streamed to standard output."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from cluster.cli import options
from cluster.cli.addresses import parse_addresses
from cluster.client import Client, Completion
from cluster.client.requests import Options
from cluster.config.schema import ROUTER_ADDRESS


def generate_command(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    address: Annotated[str, typer.Option(help="HOST:PORT of a router; several, separated by commas.")] = ROUTER_ADDRESS,
    model: Annotated[str, typer.Option(help="Served model name; default: the only one.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to generate; default: as many as fit.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample from the k likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, relative to the likeliest token's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed draws the same tokens.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after end-of-sequence.")] = False,
    priority: options.Priority = 0,
    tenant: options.Tenant = "",
    session_id: options.SessionId = "",
    timeout: Annotated[float | None, typer.Option(min=0.0, help="Seconds for the whole request.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead.")] = False,
) -> None:
    """Stream a completion of PROMPT; without sampling options the model's own defaults hold."""
    given = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "seed": seed, "repetition_penalty": repetition_penalty, "stop": stop or None, "ignore_eos": ignore_eos or None,
    }  # fmt: skip
    sampling = Options(**{name: value for name, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    text = sys.stdin.read() if prompt == "-" else prompt
    with Client(*parse_addresses(address)) as client:
        events = client.generate(
            text, model=model, priority=priority, tenant=tenant, session_id=session_id, timeout_s=timeout, **sampling
        )
        for event in events:
            if isinstance(event, Completion):
                _print_end(event, as_json=as_json)
            elif not as_json:
                print(event.text, end="", flush=True)


def usage_line(completion: Completion) -> str:
    """What a request took, in one line."""
    usage = completion.usage
    line = f"{usage.prompt_tokens} prompt + {usage.generated_tokens} generated tokens, {completion.finish_reason}"
    line += f", seed {usage.seed}"
    return line + (f", {usage.failovers} failovers" if usage.failovers else "")


def _print_end(completion: Completion, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(completion), ensure_ascii=False))
        return
    print(flush=True)
    print(f"[{usage_line(completion)}]", file=sys.stderr)
