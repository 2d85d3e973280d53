"""``llm-cluster doctor``: is this machine fit to serve, and what to do where it is not."""

from __future__ import annotations

import json as json_library
import os
from dataclasses import asdict

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.cli.fitness import Check, Role, Verdict, counts, judge
from cluster.cli.machine import probe
from cluster.config.explain import DEFAULT_SOURCE, explain
from cluster.config.load import load_config

_COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def doctor_command(
    role: Role = typer.Option(Role.WORKER, help="What it is to run; a worker has what all of them need."),
    json: bool = typer.Option(False, "--json", help="Print the checks as JSON."),
) -> None:
    """Checks this machine: versions, devices, compiler, memory, limits, ports. Exit code 1 if it cannot serve."""
    loaded = load_config(None, os.environ, {})
    checks = judge(probe(loaded.config, os.environ, role))
    if json:
        print(json_library.dumps([asdict(check) for check in checks], indent=2))
    else:
        _show(checks)
        for row in explain(loaded):
            if row.source != DEFAULT_SOURCE:
                print(f"{row.path} = {row.value} ({row.source})")
    if any(check.verdict is Verdict.FAIL for check in checks):
        raise typer.Exit(1)


def _show(checks: tuple[Check, ...]) -> None:
    console = Console()
    table = Table("check", "", "found", "what to do", title="Is this machine fit?", title_justify="left")
    for check in checks:
        colour = _COLOURS[check.verdict]
        table.add_row(check.name, f"[{colour}]{check.verdict}[/]", escape(check.finding), escape(check.fix))
    console.print(table)
    console.print(", ".join(f"{amount} {verdict}" for verdict, amount in counts(checks).items()))
