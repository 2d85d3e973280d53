"""A replica's real rank processes, forked from one that has imported everything: a new incarnation takes a second."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading

from replica_harness import Replica

from cluster.domain.endpoint import Endpoint
from cluster.engine.rank_spec import RankSpec


class ForkedReplica(Replica):
    """As ``Replica``; ``processes`` are multiprocessing's. Its log is the rank's own."""

    def __enter__(self) -> ForkedReplica:
        self._server.start()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rank_preload"])
        # The process that ranks are forked from finds modules by the environment alone.
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*sys.path, os.environ.get("PYTHONPATH", "")]))
        for spec in self.specs:
            process = context.Process(target=_live, args=(spec,), daemon=True)
            process.start()
            self.processes.append(process)
        return self

    @property
    def endpoint(self) -> Endpoint:
        """Once it is ready."""
        address = f"127.0.0.1:{self.control.latest[0].ports['engine']}"
        return Endpoint(self.incarnation, address, self.checkpoint.digest, self.specs[0].block_size)

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        self._server.stop(None).wait(10)


def _live(spec: RankSpec) -> None:
    import torch

    from cluster.engine.rank import start_rank

    torch.set_num_threads(1)
    start_rank(spec)
    threading.Event().wait()
