"""The command line's front: one table of commands, imported only when called, and one place for errors."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

import cluster
from cluster.domain.errors import ClusterError, ConfigError, NoFeasiblePlan

PROGRAM = "llm-cluster"
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# name -> (module:function, one line for --help). The function's signature is the command's options.
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("cluster.cli.serve:serve_command", "Plan, place, load and serve models."),
    "generate": ("cluster.cli.generate:generate_command", "Stream a completion."),
    "chat": ("cluster.cli.chat:chat_command", "Talk to a model."),
    "status": ("cluster.cli.status:status_command", "Show models, replicas, ranks and processes."),
    "stop": ("cluster.cli.serve:stop_command", "Drain and end a cluster."),
    "scale": ("cluster.cli.operate:scale_command", "Set how many replicas a model has."),
    "drain": ("cluster.cli.operate:drain_command", "Take a replica out of service, or empty a node."),
    "controller": ("cluster.cli.processes:controller_command", "Run Ray's head and the controller."),
    "router": ("cluster.cli.processes:router_command", "Run a router, of one process or several."),
    "worker": ("cluster.cli.processes:worker_command", "Run this machine as a node of the cluster."),
    "explain": ("cluster.cli.explain:explain_command", "Show why a request goes where it goes."),
    "doctor": ("cluster.cli.doctor:doctor_command", "Check whether this machine is fit to serve."),
    "manifest": ("cluster.cli.manifest:manifest_command", "Write or compare digests of a model's weights."),
    "plan": ("cluster.cli.plan:plan_command", "Show how a model would be laid out on a set of machines."),
}


class LazyGroup(TyperGroup):
    """Knows the commands by name; imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - typer's signature
        """A command for listings: its name and its line, nothing imported."""
        if cmd_name not in COMMANDS:
            return None
        return _command(cmd_name, lambda: None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is about to run."""
        if args and args[0] in COMMANDS:
            module, _, function = COMMANDS[args[0]][0].partition(":")
            return args[0], _command(args[0], getattr(importlib.import_module(module), function)), args[1:]
        return super().resolve_command(ctx, args)


def _command(name: str, function: Callable[..., Any]) -> Any:
    single = typer.Typer(add_completion=False)
    single.command(name, help=function.__doc__ or COMMANDS[name][1], short_help=COMMANDS[name][1])(function)
    return typer.main.get_command(single)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(cluster.__version__)
        raise typer.Exit


def build_app() -> Any:
    """The whole command line as one command object."""
    app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, help=cluster.__doc__)

    @app.callback()
    def options(
        *, version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print it.")
    ) -> None:
        del version

    return typer.main.get_command(app)


def main(argv: list[str] | None = None) -> None:
    """Run one command and leave the process: 0 done, 1 failed, 2 usage or infeasible, 130 interrupted."""
    # gRPC's C core writes lines of its own to standard error; a user's mistake gets one sentence, ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        build_app().main(args=argv, prog_name=PROGRAM)
    except (ConfigError, NoFeasiblePlan) as error:
        _leave(error, EXIT_USAGE)
    except ClusterError as error:
        _leave(error, EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _leave(error: ClusterError, code: int) -> None:
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    sys.exit(code)
