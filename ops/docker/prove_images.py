"""``ops/docker/prove``: the Dockerfile's steps on a clean Debian root, then a demo cluster served from the results.

Needs root, Linux, util-linux, iproute2 and a network; no container engine. Everything it makes lies below one
folder and is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ops.docker.building import Builder, say
from ops.docker.instructions import DockerfileError, parse
from ops.docker.roots import ROOT, ProofError, remove
from ops.docker.serving import Site, check_commands, serve_demo

DOCKERFILE = ROOT / "ops" / "docker" / "Dockerfile"
TARGETS = ("router", "controller", "worker")
FREE_BYTES = 12 * 10**9
EXIT_SKIPPED = 3


def why_not(free_bytes: int) -> str:
    """Why nothing can be proven here; "" when it can."""
    missing = [name for name in ("unshare", "nsenter", "setpriv", "chroot", "ip", "apt-get") if not shutil.which(name)]
    if sys.platform != "linux" or missing:
        return f"nothing was proven: this needs Debian's tools {', '.join(missing)}."
    if os.geteuid() != 0:
        return "nothing was proven: making and entering root filesystems needs root."
    if free_bytes < FREE_BYTES:
        return f"nothing was proven: it needs {FREE_BYTES // 10**9} GB of disk; give another folder with --folder."
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="ops/docker/prove", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this image (may be repeated)")
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build knows it"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to make the roots")
    parser.add_argument("--keep", action="store_true", help="leave the roots and logs, and say where they are")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder} is no folder; make it first, or leave the option out.")
    if reason := why_not(shutil.disk_usage(options.folder).free):
        print(f"prove: {reason}", file=sys.stderr)
        sys.exit(EXIT_SKIPPED)
    given = dict(text.partition("=")[::2] for text in options.build_arg)
    folder = Path(tempfile.mkdtemp(prefix="llm-images-", dir=options.folder))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        result = prove(folder, tuple(options.target or TARGETS), given)
        print(json.dumps(result, indent=2)) if options.json else show(result)
    except (ProofError, DockerfileError) as error:
        print(f"prove: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        if options.keep:
            say(f"the roots and logs are below {folder}")
        else:
            remove(folder)


def prove(folder: Path, targets: tuple[str, ...], given: dict[str, str]) -> dict[str, object]:
    """What was measured; ProofError for what did not hold."""
    started = time.monotonic()
    recipe = parse(DOCKERFILE, given)
    builder = Builder(recipe, folder, given)
    images = {target: builder.build(target) for target in targets}
    site = Site(folder / "site")
    skipped = []
    served: dict[str, object] = {}
    with site.network():
        for built in images.values():
            check_commands(site, built)
        if set(targets) == set(TARGETS):
            served = serve_demo(site, images["controller"], images["worker"], images["router"])
        else:
            skipped.append("No demo cluster was served: it takes all three images.")
    tag = recipe.arguments["DEBIAN"].partition("-")[0]
    if builder.release != tag:
        skipped.append(f"Debian's archive is at {builder.release}; the Dockerfile names {tag}, which was not tried.")
    skipped.append(
        "No registry was asked: the base is Debian's archive, not the published image, and no digest was checked."
    )
    stages = [
        {"stage": b.stage.name, "steps": b.steps, "seconds": round(b.seconds, 1), "bytes": b.size_bytes}
        for b in builder.built.values()
    ]
    seconds = round(time.monotonic() - started, 1)
    return {"debian": builder.release, "stages": stages, "served": served, "skipped": skipped, "seconds": seconds}


def show(result: dict[str, object]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table("stage", "steps", "seconds", "MB")
    for row in result["stages"]:
        image = row["stage"] in TARGETS
        style = "bold" if image else None
        table.add_row(row["stage"], str(row["steps"]), str(row["seconds"]), str(row["bytes"] // 10**6), style=style)
    console.print(table)
    if served := result["served"]:
        console.print(f"served: {served['answer']!r} after {served['seconds']} s; exit codes {served['exit_codes']}")
        console.print(
            f"shared-memory all-reduce loaded: {served['shared_memory_op_loaded']}; zombies: {served['zombies']}"
        )
        console.print(
            f"written to /tmp: {served['written_to_tmp']}; to the run directory: {served['written_to_run_dir']}"
        )
    for sentence in result["skipped"]:
        console.print(f"not done: {sentence}")
    console.print(f"everything above took {result['seconds']} s")


if __name__ == "__main__":
    main()
