"""Our deadline comes before the client's, however gRPC rounds."""

import math

import pytest

from cluster.router.server import deadline_within


@pytest.mark.parametrize("asked_s", [0.01, 0.5, 1.001, 9.5, 10.005, 10.05, 12.02, 99.99, 100.3, 900.0, 1003.0])
def test_rounding_up_never_makes_the_client_first(asked_s):
    unit = 0.01 if asked_s < 10 else 0.1 if asked_s < 100 else 1.0 if asked_s < 1000 else 10.0
    arrives_as = math.ceil(asked_s / unit) * unit
    assert deadline_within(arrives_as) < asked_s or asked_s < 0.02
    assert deadline_within(arrives_as) >= 0.97 * asked_s - 0.05, "nor does it cost the client much"
