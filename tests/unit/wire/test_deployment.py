from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.schema import ModelConfig
from cluster.domain.errors import ConfigError
from cluster.v1 import control_pb2
from cluster.wire.deployment import deployment_from_message, deployment_to_message

some = st.integers(1, 10_000)
configs = st.builds(
    ModelConfig,
    model=st.text(min_size=1, max_size=20),
    served_model_name=st.none() | st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True),
    revision=st.none() | st.from_regex(r"[a-f0-9]{7,40}", fullmatch=True),
    replicas=st.integers(0, 10_000),
    tensor_parallel_size=st.none() | some,
    pipeline_parallel_size=st.none() | some,
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    max_model_len=st.none() | some,
    max_num_seqs=st.integers(1, 4096),
    max_num_batched_tokens=some,
    max_num_waiting=some,
    block_size=st.integers(1, 1024),
    device_memory_utilization=st.floats(0.01, 1),
    kv_cache_bytes=st.none() | st.integers(1, 2**40),
    max_waiting_prompt_tokens=st.integers(1, 2**40),
    prefill_slowdown=st.floats(1.01, 100),
    enable_prefix_caching=st.booleans(),
    rope_scaling=st.none() | st.sampled_from(["linear:2", "dynamic:4.5", "yarn:4", "llama3:8"]),
    load_format=st.sampled_from(["auto", "dummy"]),
    seed=st.integers(0, 2**63 - 1),
)


@given(configs)
def test_what_is_sent_arrives(config: ModelConfig):
    message = control_pb2.ModelDeployment.FromString(deployment_to_message(config).SerializeToString())
    assert deployment_from_message(message) == config


def test_every_setting_travels():
    travels = {field.name for field in control_pb2.ModelDeployment.DESCRIPTOR.fields}
    assert travels == set(ModelConfig.model_fields)


def test_what_is_not_said_is_the_default():
    assert deployment_from_message(control_pb2.ModelDeployment(model="m")) == ModelConfig(model="m")


def test_a_value_out_of_bounds_is_named():
    with pytest.raises(ConfigError, match="max_num_seqs of model 'm'"):
        deployment_from_message(control_pb2.ModelDeployment(model="m", max_num_seqs=10_000))


def test_a_wrong_stretch_is_one_sentence():
    with pytest.raises(ConfigError, match=r"^rope_scaling of model 'm' is wrong: factor is 1; it must be more than 1"):
        deployment_from_message(control_pb2.ModelDeployment(model="m", rope_scaling="linear:1"))
