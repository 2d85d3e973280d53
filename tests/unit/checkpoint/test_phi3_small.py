"""What Phi-3-small's config implies without saying it."""

import pytest

from cluster.checkpoint.config_json import model_spec
from cluster.checkpoint.fields import Fields
from cluster.checkpoint.phi3_small import ffn_size, unused_tokens
from cluster.checkpoint.servable import check_functions
from cluster.domain.errors import CheckpointError
from cluster.domain.model_spec import RopeByLength

CONFIG = {"architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small", "hidden_act": "gegelu"}
LONG = {"type": "su", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("own", "size"),
    [
        ({}, 14336),
        ({"ff_intermediate_size": 100}, 100),
        ({"ff_intermediate_size": None, "ff_dim_multiplier": 4}, 11008),
        ({"ff_intermediate_size": None, "ff_dim_multiplier": 4, "gegelu_pad_to_256": False}, 10920),
    ],
)
def test_the_inner_width_is_given_or_follows_from_the_multiplier(own, size):
    assert ffn_size(Fields(own)) == size
    assert model_spec(CONFIG | own).ffn_size == size


def test_the_published_vocabulary_ends_in_ids_that_stand_for_nothing():
    unused = unused_tokens(100_352)
    assert len(unused) == 96 - 5
    assert {100_257, 100_261, 100_262, 100_263, 100_266}.isdisjoint(unused)
    assert (unused[0], unused[-1]) == (100_256, 100_351)
    assert unused_tokens(320) == ()


def test_su_is_longrope_and_follows_the_length():
    spec = model_spec(CONFIG | {"rope_scaling": LONG, "max_position_embeddings": 131_072})
    assert spec.rope_by_length == RopeByLength("dynamic", 8192)
    assert spec.scaled_context is None
    check_functions(CONFIG | {"rope_scaling": LONG})


def test_gegelu_is_no_activation_of_other_models():
    with pytest.raises(CheckpointError, match="hidden_act"):
        check_functions({"model_type": "llama", "hidden_act": "gegelu"})
