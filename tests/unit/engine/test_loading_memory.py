"""Anonymous memory of real processes that load: the shard, a few staging buffers, and nothing that grows with the model."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.engine.host_memory import AnonymousPeak, anonymous_bytes, huge_page_bytes

MB = 10**6
HERE = Path(__file__).resolve()
SIDE, COUNT = 2048, 33
TYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """About 370 MB in three element types; the value of every element is the number of its tensor."""
    folder = tmp_path_factory.mktemp("model")
    tensors = {
        f"{i}.{'row' if i % 2 else 'column'}": torch.full((SIDE, SIDE), float(i), dtype=TYPES[i % 3])
        for i in range(COUNT)
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    yield folder
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(("ranks", "dtype"), [(1, "float32"), (2, "bfloat16"), (2, "float32"), (1, "float16")])
def test_a_rank_takes_its_shard_and_little_more(model, ranks, dtype):
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE.parent / "loading_process.py"), str(model), str(rank), str(ranks), dtype],
            stdout=subprocess.PIPE, text=True, cwd=HERE.parents[3],
            env={"PYTHONPATH": str(HERE.parents[3]), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    whole = COUNT * SIDE * SIDE * getattr(torch, dtype).itemsize
    for process in processes:
        told = json.loads(process.communicate(timeout=120)[0])
        assert process.returncode == 0
        assert told["shard"] == whole // ranks
        assert 0.9 * told["shard"] < told["peak"] <= told["shard"] + told["slice"] + 100 * MB
        assert told["peak"] <= told["shard"] + 40 * MB  # four buffers of 4 MiB, threads, the plan of the reads
        assert told["shard"] + told["slice"] + 100 * MB < whole or ranks == 1


def test_the_peak_counts_what_was_written_and_is_gone():
    before = anonymous_bytes()
    with AnonymousPeak() as peak:
        torch.ones(30 * MB // 4).sum()
        peak.sample()
        held = torch.ones(50 * MB // 4)
        peak.sample()
        assert float(held[0]) == 1
        del held
    assert before > 0
    assert 50 * MB <= peak.bytes < 100 * MB


def test_files_that_are_read_do_not_count(model):
    with AnonymousPeak() as peak, (model / "model.safetensors").open("rb") as stream:
        while stream.read(MB):
            pass
    assert peak.bytes < 10 * MB


HUGE = """
import torch
from cluster.engine import host_memory
host_memory.prefer_huge_pages()
before = host_memory.huge_page_bytes()
weight = torch.ones(4096, 4096)
held = host_memory.huge_page_bytes()
packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
print(held - before, host_memory.huge_page_bytes() - held)
"""


def gives_huge_pages():
    """Whether this kernel hands out a huge page to who asks for one."""
    before = huge_page_bytes()
    with mmap.mmap(-1, 64 * 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[::4096] = b"1" * (len(memory) // 4096)
        return huge_page_bytes() - before >= 60 * 2**20


def test_weights_lie_in_huge_pages_as_read_and_as_reordered():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("transparent huge pages are off here")
    if not gives_huge_pages():
        pytest.skip("this kernel has no huge pages to give now")
    environment = {"PYTHONPATH": str(HERE.parents[3]), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-c", HUGE], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert all(int(count) >= 56 * 2**20 for count in told.stdout.split()), told.stdout
    refused = subprocess.run(
        [sys.executable, "-c", HUGE], capture_output=True, text=True, timeout=60, check=True,
        env=environment | {"THP_MEM_ALLOC_ENABLE": "0"},
    )  # fmt: skip
    if "[madvise]" in setting.read_text():
        assert all(int(count) < 8 * 2**20 for count in refused.stdout.split()), "the operator's own choice counts"


def test_packing_takes_one_more_copy_of_the_largest_slice(model):
    """For a CPU's products the weights are put into another order one after the other, in a process of their own."""
    told = subprocess.run(
        [sys.executable, str(HERE.parent / "loading_process.py"), str(model), "0", "1", "float32", "pack"],
        capture_output=True, text=True, cwd=HERE.parents[3], timeout=120, check=True,
        env={"PYTHONPATH": str(HERE.parents[3]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told = json.loads(told.stdout)
    assert told["packed"] == COUNT
    assert told["peak"] <= told["shard"] + told["slice"] + 40 * MB


ENTRY = """
import os, sys, types
import cluster.controller.rank_actor
from cluster.engine import rank

class Process:
    def __init__(self, spec, stream):
        print(os.environ["THP_MEM_ALLOC_ENABLE"], "torch" in sys.modules)
    def run(self):
        pass

rank.RankProcess = Process
rank.start_rank(types.SimpleNamespace(rank_id="m/0@1/0", log_file=sys.argv[1]))
"""


@pytest.mark.parametrize(("environment", "asked"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_a_rank_asks_for_huge_pages_before_it_imports_torch(tmp_path, environment, asked):
    """And leaves the operator his choice."""
    told = subprocess.run(
        [sys.executable, "-c", ENTRY, str(tmp_path / "logs" / "rank.log")],
        capture_output=True, text=True, cwd=HERE.parents[3], timeout=60, check=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE.parents[3]), **environment},
    )  # fmt: skip
    assert told.stdout == f"{asked} False\n"
