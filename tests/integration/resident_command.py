"""``llm-cluster`` in a process that stays: what is asked again and again costs no start of Python each time."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Sequence

# The command itself, as a user runs it: its arguments come as a line of JSON, its answer goes as one.
_PROGRAM = """
import contextlib, io, json, sys
from cluster.cli.main import main
for line in sys.stdin:
    said, complained, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        try:
            main(json.loads(line))
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue(), complained.getvalue()]), flush=True)
"""


class ResidentCommand:
    """``prefix``: what starts a process where the command shall run. Started when it is needed, also when it was killed."""

    def __init__(self, *prefix: str) -> None:
        self._command = [*prefix, sys.executable, "-c", _PROGRAM]
        self._process: subprocess.Popen[bytes] | None = None

    def answer(self, arguments: Sequence[str], deadline_s: float = 60) -> str:
        """What the command prints; AssertionError with what it complains of when it fails, or says nothing so long."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._process.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
        ready, _, _ = select.select([self._process.stdout], [], [], deadline_s)
        line = self._process.stdout.readline() if ready else b""
        assert line, f"{arguments[0]} did not answer"
        code, said, complained = json.loads(line)
        assert code == 0, complained
        return said

    def close(self) -> None:
        """The process, if there is one, is gone afterwards."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()
