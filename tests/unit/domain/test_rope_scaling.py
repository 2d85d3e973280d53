from __future__ import annotations

import json

import pytest

from cluster.domain.rope_scaling import canonical_rope_scaling

LONG = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}


@pytest.mark.parametrize(
    "same",
    ["linear:2", " linear :2.0", '{"rope_type": "linear", "factor": 2}', '{"type": "linear", "factor": 2.0}',
     {"factor": 2, "rope_type": "linear"}],
)  # fmt: skip
def test_what_means_the_same_is_written_the_same(same) -> None:
    assert canonical_rope_scaling(same) == '{"factor": 2.0, "rope_type": "linear"}'


@pytest.mark.parametrize("value", ["dynamic:4", "yarn:1.5", "llama3:8", json.dumps(LONG)])
def test_what_is_written_is_read_again(value: str) -> None:
    once = canonical_rope_scaling(value)
    assert canonical_rope_scaling(once) == once
    assert json.loads(once)["factor"] > 1


def test_llama3_has_the_published_bounds() -> None:
    scaling = json.loads(canonical_rope_scaling("llama3:8"))
    assert scaling == {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("stretchy:2", "it must be one of dynamic, linear, llama3, longrope, yarn"),
        ("default:2", "must be one of"),
        ("linear", "needs a factor"),
        ("linear:much", "'much' is no factor"),
        ("linear:1", "more than 1"),
        ("dynamic:0.5", "more than 1"),
        ("linear:-2", "a number above 0"),
        ("linear:nan", "a number above 0"),
        ("linear:inf", "a number above 0"),
        ("{linear}", "no JSON object"),
        ('{"rope_type": "linear", "factor": true}', "a number above 0"),
        ('{"rope_type": "linear", "factor": 2, "beta_fast": 3}', "beta_fast is no field of rope_type linear"),
        ('{"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 64}', "is no field of"),
        ('{"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}', "whole number of tokens"),
        ('{"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}', "must be more than"),
        ("longrope:4", "needs short_factor and long_factor"),
        (json.dumps(LONG | {"short_factor": [1.0]}), "both alike"),
        (json.dumps(LONG | {"long_factor": [1.0, "x"]}), "a number above 0"),
        (json.dumps(LONG | {"long_factor": 3}), "a list of numbers"),
        ({key: value for key, value in LONG.items() if key != "factor"}, "needs a factor"),
        ("{}", "rope_type is None"),
    ],
)  # fmt: skip
def test_what_no_model_could_use_is_refused_in_a_sentence(value, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        canonical_rope_scaling(value)
