from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.explain import explain
from cluster.config.load import NOT_SETTINGS, load_config
from cluster.config.schema import ClusterConfig
from cluster.domain.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        file = tmp_path / "cluster.yaml"
        file.write_text(text)
        return file

    return write


def refusal(file: Path | None = None, env: dict[str, str] | None = None, flags: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, env or {}, flags or {})
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


class TestLayers:
    def test_nothing_given_is_the_defaults(self) -> None:
        loaded = load_config(None, {"PATH": "/bin"}, {})
        assert loaded.config == ClusterConfig()
        assert loaded.sources == {}

    def test_file_then_environment_then_flag(self, write) -> None:
        file = write("router:\n  port: 1\n  max_failovers: 2\n  metrics_port: 3\n")
        env = {"LLM_CLUSTER_ROUTER__MAX_FAILOVERS": "20", "LLM_CLUSTER_ROUTER__METRICS_PORT": "30"}
        loaded = load_config(file, env, {"router.metrics_port": 300})
        router = loaded.config.router
        assert (router.port, router.max_failovers, router.metrics_port) == (1, 20, 300)
        assert loaded.sources == {
            "router.port": f"{file}:2",
            "router.max_failovers": "environment variable LLM_CLUSTER_ROUTER__MAX_FAILOVERS",
            "router.metrics_port": "flag",
        }

    def test_a_flag_of_none_was_not_given(self, write) -> None:
        loaded = load_config(write("router: {port: 7}"), {}, {"router.port": None})
        assert loaded.config.router.port == 7

    def test_models_from_the_file_and_one_setting_from_the_environment(self, write) -> None:
        file = write("models:\n  - model: /m/a\n    replicas: 2\n  - model: /m/b\n")
        loaded = load_config(file, {"LLM_CLUSTER_MODELS__1__REPLICAS": "5"}, {})
        assert [(m.name, m.replicas) for m in loaded.config.models] == [("a", 2), ("b", 5)]
        assert loaded.sources["models.0.model"] == f"{file}:2"
        assert loaded.sources["models.0.replicas"] == f"{file}:3"

    def test_a_whole_list_replaces_a_whole_list(self, write) -> None:
        file = write("models:\n  - {model: a, replicas: 2}\n  - {model: b}\n")
        loaded = load_config(file, {}, {"models": [{"model": "c"}]})
        assert [(m.model, m.replicas) for m in loaded.config.models] == [("c", 1)]

    def test_an_empty_list_replaces_too(self, write) -> None:
        loaded = load_config(write("models:\n  - model: a\n"), {"LLM_CLUSTER_MODELS": "[]"}, {})
        assert loaded.config.models == ()

    def test_lists_in_the_environment_are_yaml(self) -> None:
        env = {
            "LLM_CLUSTER_MODELS": "[{model: demo, replicas: 3}]",
            "LLM_CLUSTER_CONTROLLER__RANK_PORTS": "[2000, 2999]",
        }
        config = load_config(None, env, {}).config
        assert config.models[0].replicas == 3
        assert config.controller.rank_ports == (2000, 2999)

    @pytest.mark.parametrize(
        "text",
        ["rope_scaling: {rope_type: yarn, factor: 4}", "rope_scaling:\n      factor: 4.0\n      rope_type: yarn",
         "rope_scaling: yarn:4", """rope_scaling: '{"rope_type": "yarn", "factor": 4}'"""],
    )  # fmt: skip
    def test_a_stretch_is_a_mapping_or_a_text(self, write, text: str) -> None:
        file = write(f"models:\n  - model: a\n    {text}\n")
        loaded = load_config(file, {}, {})
        assert loaded.config.models[0].rope_scaling == '{"factor": 4.0, "rope_type": "yarn"}'
        assert loaded.sources["models.0.rope_scaling"].startswith(f"{file}:")

    @pytest.mark.parametrize(
        "value", ["linear:2", "{rope_type: linear, factor: 2}", '{"rope_type":"linear","factor":2}']
    )
    def test_a_stretch_from_the_environment_replaces_the_files(self, write, value: str) -> None:
        file = write("models:\n  - {model: a, rope_scaling: {rope_type: yarn, factor: 4, beta_fast: 16}}\n")
        loaded = load_config(file, {"LLM_CLUSTER_MODELS__0__ROPE_SCALING": value}, {})
        assert loaded.config.models[0].rope_scaling == '{"factor": 2.0, "rope_type": "linear"}'

    def test_a_section_with_nothing_in_it_says_nothing(self, write) -> None:
        assert load_config(write("router:\nmodels:\n"), {}, {}).config == ClusterConfig()

    def test_an_empty_file_says_nothing(self, write) -> None:
        assert load_config(write("# nothing yet\n"), {}, {}).config == ClusterConfig()

    def test_variables_of_the_scripts_are_no_settings(self) -> None:
        env = {"LLM_CLUSTER_PIP_ARGS": "--no-index", "LLM_CLUSTER_PYTHON": "python3.12"}
        assert load_config(None, env, {}).config == ClusterConfig()

    def test_every_variable_that_we_name_is_a_setting_or_known_not_to_be(self) -> None:
        files = [path for path in ((ROOT / "cluster").rglob("*.py")) if path.name != "load.py"]
        files += [ROOT / "ops" / name for name in ("setup", "test", "check", "demo")]
        named = {name for file in files for name in re.findall(r"LLM_CLUSTER_[A-Z_]*[A-Z]", file.read_text())}
        assert named
        for name in named - NOT_SETTINGS - {"LLM_CLUSTER_RUN_DIR"}:
            load_config(None, {name: "1"}, {})

    def test_numbers_and_truth_read_from_text(self) -> None:
        env = {"LLM_CLUSTER_CLUSTER_NAME": "123", "LLM_CLUSTER_ROUTER__FAILOVER_WAIT_S": "1.5"}
        config = load_config(None, env, {}).config
        assert config.cluster_name == "123"
        assert config.router.failover_wait_s == 1.5

    @given(st.integers(0, 65535))
    def test_a_value_is_the_same_from_variable_and_flag(self, port: int) -> None:
        from_variable = load_config(None, {"LLM_CLUSTER_ROUTER__PORT": str(port)}, {})
        assert from_variable.config == load_config(None, {}, {"router.port": port}).config
        assert from_variable.config.router.port == port


class TestRefusals:
    def test_unknown_key_names_path_line_and_the_nearest(self, write) -> None:
        file = write("cluster_name: a\nrouter:\n  prot: 1\n")
        assert refusal(file) == f"router.prot ({file}:3) is no setting; the nearest one is router.port."

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("routr: {}\n", "routr (FILE:1) is no setting; the nearest one is router.port."),
            ("models:\n  - {}\n", "models.0 (FILE:2) is a section; write its settings below it, one by one."),
            ("router:\n  port: {}\n", "router.port (FILE:2): input should be a valid integer."),
        ],
    )
    def test_what_holds_nothing_is_checked_too(self, write, text: str, said: str) -> None:
        file = write(text)
        assert refusal(file) == said.replace("FILE", str(file))

    def test_unknown_key_of_a_model(self, write) -> None:
        file = write("models:\n  - model: a\n  - model: b\n    replica: 2\n")
        assert f"models.1.replica ({file}:4)" in refusal(file)
        assert "models.1.replicas" in refusal(file)

    def test_unknown_variable(self) -> None:
        message = refusal(env={"LLM_CLUSTER_ROUTER_PORT": "1"})
        assert "LLM_CLUSTER_ROUTER_PORT" in message
        assert "router.port" in message

    def test_bad_value_names_the_value_and_the_variable(self) -> None:
        message = refusal(env={"LLM_CLUSTER_ROUTER__PORT": "many"})
        assert "router.port = 'many' (environment variable LLM_CLUSTER_ROUTER__PORT)" in message

    def test_bad_value_inside_a_list(self, write) -> None:
        file = write("controller:\n  rank_ports: [1, two]\n")
        assert f"controller.rank_ports = 'two' ({file}:2)" in refusal(file)

    def test_bad_flag(self) -> None:
        assert "router.port = 70000 (flag): " in refusal(flags={"router.port": 70000})

    def test_a_stretch_that_nothing_could_use(self, write) -> None:
        said = refusal(write("models:\n  - model: a\n    rope_scaling: {rope_type: linear, factor: 0.5}\n"))
        assert said.startswith("models.0.rope_scaling")
        assert ":3): factor is 0.5; it must be more than 1" in said
        assert "needs a factor" in refusal(flags={"models.0.model": "a", "models.0.rope_scaling": "linear"})

    def test_a_missing_key_names_its_neighbour(self, write) -> None:
        file = write("models:\n  - replicas: 2\n")
        assert refusal(file) == f"models.0.model is missing ({file}:2); add it."

    def test_two_models_of_one_name(self, write) -> None:
        message = refusal(write("models:\n  - model: /a/demo\n  - model: /b/demo\n"))
        assert "two models are served as demo" in message

    def test_a_gap_in_the_numbers(self) -> None:
        assert "models.3" in refusal(env={"LLM_CLUSTER_MODELS__3__MODEL": "a"})

    def test_a_section_is_no_value(self) -> None:
        assert "router (flag) is a section" in refusal(flags={"router": 5})

    def test_a_value_is_no_section(self) -> None:
        assert "cluster_name.x (flag) is no setting" in refusal(flags={"cluster_name.x": 5})

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a: [", "no valid YAML"),
            ("- 1\n- 2\n", "holds no settings"),
            ("router: {port: 1}\nrouter: {port: 2}\n", "twice"),
            ("router: &a {b: *a}\n", "nests deeper"),
            ("x: !!python/object:os.system 1\n", "no valid YAML"),
        ],
    )
    def test_bad_files(self, write, text: str, said: str) -> None:
        assert said in refusal(write(text))

    def test_missing_file(self, tmp_path: Path) -> None:
        assert "There is no file" in refusal(tmp_path / "none.yaml")

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        assert "cannot be read" in refusal(tmp_path)

    def test_bad_yaml_in_a_variable(self) -> None:
        assert "LLM_CLUSTER_MODELS" in refusal(env={"LLM_CLUSTER_MODELS": "[{model: demo"})


class TestExplain:
    def test_a_row_for_every_setting_with_its_source(self, write) -> None:
        file = write("models:\n  - model: a\n")
        rows = {row.path: row for row in explain(load_config(file, {}, {"router.port": 9}))}
        assert rows["models.0.model"].source == f"{file}:2"
        assert rows["models.0.replicas"].source == "default"
        assert (rows["router.port"].value, rows["router.port"].source) == (9, "flag")
        assert rows["controller.rank_ports"].value == (20000, 23999)

    def test_every_set_path_has_a_row(self) -> None:
        flags = {"models": [{"model": "a", "replicas": 2}], "controller.rank_ports": [2000, 2999], "run_dir": "/tmp/x"}
        loaded = load_config(None, {}, flags)
        assert set(loaded.sources) <= {row.path for row in explain(loaded)}
