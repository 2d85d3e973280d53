"""``llm-cluster manifest``: digests for a checkpoint's weights, written or compared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify, write_manifest
from cluster.domain.errors import CheckpointError


def manifest_command(
    directory: Annotated[Path, typer.Argument(help="Directory with config.json and safetensors weights.")],
    check: Annotated[bool, typer.Option("--check", help="Compare with the manifest that is there.")] = False,
) -> None:
    """Write sha256 digests of the weights beside them; from then on every rank verifies what it loads.

    Exit status: 0, or 1 when --check finds a file that is damaged, missing or of another size, or 2 when there is no
    manifest to compare with or the directory cannot be used.
    """
    if check:
        digests = read_manifest(directory)
        if digests is None:
            raise CheckpointError(f"{directory} has no {MANIFEST_FILE}; say 'llm-cluster manifest {directory}' first.")
        try:
            with _bar() as bar:
                verify(directory, digests, _progress(bar, "Comparing"))
        except CheckpointError as error:  # the answer that was asked for, not a wrong question
            print(f"llm-cluster: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        print(f"{directory}: {len(digests)} files are what {MANIFEST_FILE} says.")
        return
    # An old manifest must not stand in the way of a new one.
    files = read_checkpoint(directory, manifest=False).files
    with _bar() as bar:
        path = write_manifest(directory, files, _progress(bar, "Reading"))
    print(f"{path} has the digests of {len(files)} files.")


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _progress(bar: Progress, what: str) -> Callable[[int, int], None]:
    task = bar.add_task(what, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)
