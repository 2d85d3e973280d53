"""What would fail only in a rank or at the first chat is found before anything starts."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.layout import read_checkpoint
from cluster.checkpoint.resolve import demo_path
from cluster.checkpoint.servable import check_default_sampling, check_functions, check_servable
from cluster.domain.errors import CheckpointError

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 64}


@pytest.fixture
def demo(tmp_path) -> Path:
    return Path(shutil.copytree(demo_path(), tmp_path / "demo"))


def test_the_demo_model_can_be_served():
    assert check_servable(read_checkpoint(demo_path())).architecture == "LlamaForCausalLM"


def test_a_broken_tokenizer_is_named(demo):
    (demo / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
        check_servable(read_checkpoint(demo))


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_broken_chat_template_is_named_with_its_line(demo, place):
    template = "{% for message in messages %}\n{{ message['content'] }}\n{% endfo %}"
    if place == "chat_template.jinja":
        (demo / place).write_text(template)
    else:
        config = json.loads((demo / place).read_text()) | {"chat_template": template}
        (demo / place).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{place}: the chat template has an error in line 3"):
        check_servable(read_checkpoint(demo))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_parameters": {"rope_type": "bogus"}}, "rope type 'bogus'"),
        ({"rope_scaling": {"type": "su"}}, "rope type 'su'"),
        ({"hidden_act": "bogus"}, "hidden_act 'bogus'"),
    ],
)
def test_unknown_functions_are_named(config, says):
    with pytest.raises(CheckpointError, match=says):
        check_functions(config)


def test_known_functions_pass():
    check_functions({})
    check_functions({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "hidden_act": "gelu_pytorch_tanh"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", -1), ("top_k", 1.5), ("temperature", "hot"), ("temperature", -0.1), ("top_p", 0), ("top_p", 1.1),
     ("min_p", 2), ("repetition_penalty", 0), ("temperature", float("nan")), ("temperature", True)],
)  # fmt: skip
def test_default_sampling_has_bounds(name, value):
    with pytest.raises(CheckpointError, match=f"generation_config.json: {name} is"):
        check_default_sampling({name: value})


def test_usual_default_sampling_passes():
    check_default_sampling({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": None})


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 64),
    ],
)
def test_every_rope_type_is_served_to_its_scaled_length(rope, length):
    assert model_spec(LLAMA | {"rope_parameters": rope}).max_model_len == length
