"""``llm-cluster plan`` as its user runs it: quick, small, and without the heavy libraries."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.integration

LLAMA_405B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16384, "num_hidden_layers": 126,
    "num_attention_heads": 128, "num_key_value_heads": 8, "intermediate_size": 53248, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip

# Runs the command line in this very process, then reports what it cost to standard error.
_MEASURED = """
import atexit, json, resource, sys
def report():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "grpc", "deepspeed", "transformers"})
    print(json.dumps({"cpu_s": usage.ru_utime + usage.ru_stime, "heavy": heavy}), file=sys.stderr)
atexit.register(report)
from cluster.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_405B))
    return file


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_405b_on_two_nodes_finds_a_layout(config: Path) -> None:
    done = run("-m", "cluster", "plan", str(config), "--nodes", "2", "--devices-per-node", "8", "--device", "h100")
    assert done.returncode == 0, done.stderr
    assert "TP8 x PP2" in done.stdout
    assert "52.8 GB" in done.stdout  # weights of each rank of the first stage
    assert done.stderr == ""


@pytest.mark.parametrize(("nodes", "code"), [("2", 0), ("1", 2)])
def test_it_is_quick_and_small(config: Path, nodes: str, code: int) -> None:
    done = run(
        "-c", _MEASURED, "plan", str(config), "--nodes", nodes, "--devices-per-node", "8", "--device", "h100", "--json"
    )
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["feasible"] is (code == 0)
    cost = json.loads(done.stderr.splitlines()[-1])
    assert cost["heavy"] == []
    assert cost["cpu_s"] < 2.0
    # In KiB: the largest of all children so far, so other tests' children could only make this stricter.
    measured = run("-c", f"import resource, subprocess, sys\n"
                   f"subprocess.run([sys.executable, '-m', 'cluster', 'plan', {str(config)!r}, '--nodes', '{nodes}',"
                   f" '--devices-per-node', '8', '--device', 'h100'], stdout=subprocess.DEVNULL)\n"
                   f"print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")  # fmt: skip
    assert int(measured.stdout) < 300 * 1024
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


def test_405b_on_one_node_says_why_not(config: Path) -> None:
    done = run("-m", "cluster", "plan", str(config), "--nodes", "1", "--devices-per-node", "8", "--device", "h100")
    assert done.returncode == 2
    assert "TP8 x PP1 on h100" in done.stdout
    assert "105 GB of weights" in " ".join(done.stdout.split())
    assert "add 1 node" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", "/no/such/model"), "does not exist; give a directory"),
        (("plan", "{config}", "--device", "h1000"), "No device type is called 'h1000'"),
        (("plan", "{config}", "--dtype", "int4"), "--dtype 'int4' is not allowed"),
        (("plan", "{config}", "--max-model-len", "999999", "--device", "h100"), "more than the model's 131072"),
        (("plan", "{config}", "--rope-scaling", "linear:2"), "positions are stretched already (llama3)"),
        (
            ("plan", "{config}", "--rope-scaling", "linear:0.5"),
            "--rope-scaling 'linear:0.5' is not allowed: factor is 0.5",
        ),
        (("plan", "{config}", "--output", "toml"), "Invalid value for '--output'"),
        (("plan",), "Missing argument"),
        (("plam",), "No such command"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(config: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run("-m", "cluster", *(a.format(config=config) for a in arguments))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_with_only_its_config_is_enough(config: Path) -> None:
    done = run("-m", "cluster", "plan", str(config.parent), "--nodes", "2", "--device", "h100", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["tensor_parallel_size"], answer["pipeline_parallel_size"]) == (8, 2)
    assert {rank["read_bytes"] for rank in answer["ranks"]} == {0}


def test_a_stretched_context_is_planned_for(config: Path) -> None:
    llama_2 = {key: value for key, value in LLAMA_405B.items() if key != "rope_scaling"} | {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    config.write_text(json.dumps(llama_2))
    asked = ("-m", "cluster", "plan", str(config), "--device", "a100", "--json")
    plain, stretched = (json.loads(run(*asked, *how).stdout) for how in ((), ("--rope-scaling", "linear:2")))
    assert (plain["max_model_len"], stretched["max_model_len"]) == (4096, 8192)
    values = yaml.safe_load(run(*asked[:-1], "--rope-scaling", "yarn:2", "--output", "helm").stdout)
    assert values["models"][0]["max_model_len"] == 8192
    assert json.loads(values["models"][0]["rope_scaling"]) == {"rope_type": "yarn", "factor": 2.0}


def test_values_for_the_chart_go_to_standard_output_and_nothing_else_does(config: Path) -> None:
    asked = ("plan", str(config), "--devices-per-node", "8", "--device", "h100", "--output", "helm")
    done = run("-m", "cluster", *asked, "--nodes", "2")
    assert (done.returncode, done.stderr) == (0, "")
    values = yaml.safe_load(done.stdout)
    assert values["models"][0]["model"] == f"/models/{config.parent.name}"
    assert [(group["replicas"], group["devicesPerPod"]) for group in values["workers"]] == [(2, 8)]
    none = run("-m", "cluster", *asked, "--nodes", "1")
    assert (none.returncode, none.stdout) == (2, "")
    assert "add 1 node" in " ".join(none.stderr.split())


def test_json_has_two_names(config: Path) -> None:
    asked = ("-m", "cluster", "plan", str(config), "--nodes", "2", "--device", "h100")
    both = [run(*asked, *how) for how in (("--json",), ("--output", "json"))]
    assert both[0].stdout == both[1].stdout
    assert json.loads(both[0].stdout)["feasible"]


def test_this_machine_is_the_default(tmp_path: Path) -> None:
    small = LLAMA_405B | {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 300, "max_position_embeddings": 256, "rope_scaling": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(small))
    done = run("-m", "cluster", "plan", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["device"], answer["dtype"], answer["world_size"]) == ("cpu", "float32", 1)


def test_help_lists_every_command_without_importing_them() -> None:
    done = run("-m", "cluster", "--help")
    assert done.returncode == 0
    assert "plan" in done.stdout
