"""One rank's place in its tensor-parallel group: how ranks meet, and what they send each other.

On CPU the all-reduce is DeepSpeed's shared-memory kernel where that is correct (the group is the whole world of one
host and LOCAL_SIZE says so) and gloo elsewhere; see ``Collective``.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch._C._distributed_c10d import TCPStore

from cluster.domain.errors import EngineFailed
from cluster.engine import shm_kernel
from cluster.engine.rank_spec import Collective


class TensorParallelGroup:
    """One rank's membership in a TP group; of size 1 it needs neither DeepSpeed nor a process group.

    ``join`` blocks until every rank has come, at most ``deadline_s``.
    """

    def __init__(self, rank: int, size: int, collective: Collective) -> None:
        assert 0 <= rank < size
        self.rank, self.size, self.collective = rank, size, collective
        self.process_group: Any = None

    def join(self, host: str, port: int, deadline_s: float) -> None:
        """Meets the other ranks at ``host:port``, a store that rank 0 opens."""
        if self.size == 1:
            return
        _configure_environment(self, host, port)
        import deepspeed.comm  # noqa: F401 - loads the torch backend that _without_shared_memory mends

        if self.collective == "shm":
            _load_shared_memory_kernel()
        else:
            _without_shared_memory()
        backend, timeout = "nccl" if self.collective == "nccl" else "gloo", timedelta(seconds=deadline_s)
        try:
            torch.distributed.init_process_group(
                backend,
                store=self._open_store(host, port, timeout),
                rank=self.rank,
                world_size=self.size,
                timeout=timeout,
                device_id=torch.device("cuda", 0) if backend == "nccl" else None,
            )
            # DeepSpeed takes over the world that is there.
            sys.modules["deepspeed.comm"].init_distributed(
                dist_backend=backend, auto_mpi_discovery=False, verbose=False, rank=self.rank, world_size=self.size
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineFailed(f"The ranks did not meet at {host}:{port}: {error}", retryable=True) from error
        self.process_group = torch.distributed.new_group(list(range(self.size)))

    def _open_store(self, host: str, port: int, timeout: timedelta) -> TCPStore:
        """Rank 0 listens on ``host`` alone: left to itself torch's store listens on every interface."""
        if self.rank > 0:
            return TCPStore(host, port, self.size, is_master=False, timeout=timeout)
        listener = socket.create_server((host, port))
        return TCPStore(
            host, port, self.size, is_master=True, timeout=timeout, master_listen_fd=listener.detach(),
            wait_for_workers=False,
        )  # fmt: skip

    def gather_columns(self, local: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        """Columns of every rank side by side, on rank 0; None on the others.

        ``local``: ``[rows, sizes[rank]]``. The shared-memory kernel knows only sums, so there the columns travel
        as a sum with zeros, which is exact.
        """
        if self.size == 1:
            return local
        rows, offset = local.shape[0], sum(sizes[: self.rank])
        if self.collective == "shm":
            full = local.new_zeros(rows, sum(sizes))
            full[:, offset : offset + sizes[self.rank]] = local
            sys.modules["deepspeed.comm"].inference_all_reduce(full, group=self.process_group)
            return full if self.rank == 0 else None
        padded = local.new_zeros(rows, max(sizes))
        padded[:, : sizes[self.rank]] = local
        received = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        torch.distributed.gather(padded, received, dst=0, group=self.process_group)
        if received is None:
            return None
        return torch.cat([part[:, :size] for part, size in zip(received, sizes, strict=True)], dim=1)


def _configure_environment(group: TensorParallelGroup, host: str, port: int) -> None:
    """What DeepSpeed's kernel, gloo and NCCL read from the environment; before any of them is loaded."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(group.rank), str(group.size)
    # DeepSpeed binds NCCL to cuda:LOCAL_RANK, and a rank sees one device only, its own.
    os.environ["LOCAL_RANK"] = "0" if group.collective == "nccl" else str(group.rank)
    if group.collective == "shm":
        os.environ["LOCAL_SIZE"] = str(group.size)
    if group.collective != "nccl":
        os.environ["DS_ACCELERATOR"] = "cpu"
    interface = _interface_towards(host)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _interface_towards(host: str) -> str | None:
    """The network interface whose own address routes to ``host``: chosen once, for gloo and NCCL alike."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: only asks the routing table
        except OSError:
            return None
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            return name
    return None


def _load_shared_memory_kernel() -> None:
    """Gives DeepSpeed the compiled kernel directly.

    Its own loader asks for ninja, may start a compiler, and waits for ever on the lock of a build that was killed.
    """
    from deepspeed.accelerator import get_accelerator

    spec = importlib.util.spec_from_file_location(shm_kernel.EXTENSION, shm_kernel.kernel_file())
    assert spec is not None
    assert spec.loader is not None
    try:
        kernel = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernel)
    except ImportError as error:
        raise EngineFailed(
            f"{shm_kernel.kernel_file()} does not load ({error}); say 'ops/setup' to build it again.", retryable=False
        ) from error
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    builder._loaded_ops[shm_kernel.EXTENSION] = kernel  # noqa: SLF001 - DeepSpeed's own cache of loaded kernels


def _without_shared_memory() -> None:
    """Keeps DeepSpeed from building its shared-memory kernel, which it would use even where that sums wrongly."""
    # `import deepspeed.comm.torch` would give the real torch: the module hides under the same name.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
