"""What is refused before anything is started, and that the controller would have said the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.checkpoint import hub
from cluster.checkpoint.resolve import demo_path
from cluster.config.schema import ModelConfig
from cluster.controller.checkpoint_planner import CheckpointPlanner
from cluster.controller.early_checks import check_models, this_machine
from cluster.domain.errors import ClusterError, ConfigError, NoFeasiblePlan
from tests.unit.controller.builders import inventory, node

MACHINE = inventory(node("here", 4))
HEADS = "ranks are more than the model's 8 query heads, and no rank may be without one"


def demo(**changes) -> ModelConfig:
    return ModelConfig(model="demo", **changes)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"tensor_parallel_size": 16}, f"16 {HEADS}"),
        ({"tensor_parallel_size": 4096}, f"4096 {HEADS}"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 9}, "9 stages are more than the model's 4 layers"),
        ({"max_model_len": 4096}, "--max-model-len 4096 is more than the model's 2048"),
    ],
)
@pytest.mark.parametrize("machine", [inventory(node("here", 8192)), None], ids=["known", "unknown"])
def test_what_the_models_shape_rules_out_is_refused_on_any_machines(machine, asked, says):
    with pytest.raises((NoFeasiblePlan, ConfigError), match=says):
        check_models((demo(**asked),), machine)


@pytest.mark.parametrize(
    "asked",
    [
        {"tensor_parallel_size": 16},
        {"tensor_parallel_size": 8},  # wider than the node
        {"pipeline_parallel_size": 9},
        {"replicas": 5},
        {"kv_cache_bytes": 5},
        {"max_model_len": 4096},
        {"device": "cuda"},
    ],
)
async def test_on_known_machines_the_controllers_own_sentence_is_said(asked):
    config = demo(**asked)
    with pytest.raises(ClusterError) as late:
        await CheckpointPlanner(lambda _: MACHINE).plan(config, ())
    with pytest.raises(type(late.value)) as early:
        check_models((config,), MACHINE)
    assert str(early.value) == str(late.value)


def test_a_model_gets_what_those_before_it_leave():
    pair = (demo(replicas=3), demo(replicas=2, served_model_name="again"))
    with pytest.raises(NoFeasiblePlan, match="again"):
        check_models(pair, MACHINE)
    assert len(check_models(pair, None)) == 2, "of machines that are not known nothing is said"


def test_what_fits_comes_back_as_every_process_understands_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_path(), tmp_path / "mine")
    known, mine = check_models((demo(tensor_parallel_size=2), ModelConfig(model="mine")), MACHINE)
    assert known == demo(tensor_parallel_size=2)
    assert (mine.model, mine.name) == (str((tmp_path / "mine").resolve()), "mine")


def test_weights_that_are_made_need_no_files(tmp_path):
    shutil.copy(Path(demo_path(), "config.json"), tmp_path)
    made = ModelConfig(model=str(tmp_path), load_format="dummy")
    assert check_models((made,), MACHINE)
    with pytest.raises(ClusterError, match="safetensors"):
        check_models((made.model_copy(update={"load_format": "auto"}),), MACHINE)


def test_a_stretched_context_counts():
    longer = demo(max_model_len=4096, rope_scaling="linear:2")
    assert check_models((longer,), MACHINE)
    assert check_models((longer,), None)


@pytest.mark.parametrize("machine", [MACHINE, None])
def test_a_hub_model_is_judged_by_its_configuration_alone(monkeypatch, machine):
    fetched = []

    def download(repo_id, commit, *, weights=True, progress=None):
        fetched.append(weights)
        return demo_path()

    monkeypatch.setattr(hub, "resolve_commit", lambda *_: "c" * 40)
    monkeypatch.setattr(hub, "download", download)
    (found,) = check_models((ModelConfig(model="org/name"),), machine)
    assert found.revision == "c" * 40
    with pytest.raises(NoFeasiblePlan, match=HEADS):
        check_models((ModelConfig(model="org/name", tensor_parallel_size=16),), machine)
    assert fetched == [False, False]


def test_a_hub_model_whose_configuration_does_not_say_all_is_left_to_the_controller(monkeypatch):
    def download(*_, **__):
        raise ConfigError("the network is away")

    monkeypatch.setattr(hub, "resolve_commit", lambda *_: "c" * 40)
    monkeypatch.setattr(hub, "download", download)
    assert check_models((ModelConfig(model="org/name", tensor_parallel_size=16),), MACHINE)


def test_a_machine_that_may_have_accelerators_is_not_known(tmp_path):
    found = this_machine(6, "10.0.0.1", tmp_path)
    assert found is not None
    assert (found.free_devices, found.nodes[0].host) == (6, "10.0.0.1")
    (tmp_path / "nvidia0").touch()
    assert this_machine(6, "10.0.0.1", tmp_path) is None
