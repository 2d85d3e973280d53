"""Two results agree where only roundings and the order of long sums tell them apart."""

import pytest
import torch

from cluster.engine.model import agreement

TYPES = [torch.float32, torch.bfloat16]


def exact(rows=5, width=512, terms=4096):
    """A product in float64, and its factors."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, terms, generator=generator, dtype=torch.float64)
    weight = torch.randn(terms, width, generator=generator, dtype=torch.float64)
    return x @ weight, x, weight


@pytest.mark.parametrize("dtype", TYPES)
def test_a_spacing_more_or_less_is_the_same(dtype):
    product = exact()[0].to(dtype)
    upwards = torch.where(torch.rand(product.shape) < 0.5, product * (1 + torch.finfo(dtype).eps), product)
    assert agreement.agree(upwards.to(dtype), product)


@pytest.mark.parametrize("dtype", TYPES)
def test_so_is_a_sum_in_another_order_and_what_is_rounded_on_the_way(dtype):
    _, x, weight = exact()
    halves = [
        x[:, half].to(dtype).float() @ weight[half].to(dtype).float() for half in (slice(0, 999), slice(999, None))
    ]
    whole = x.to(dtype).float() @ weight.to(dtype).float()
    assert agreement.agree((halves[0] + halves[1]).to(dtype), whole.to(dtype))
    if dtype == torch.bfloat16:  # the terms are rounded in one of them only, as where a gated product is stored
        assert agreement.agree((x.float() @ weight.to(dtype).float()).to(dtype), whole.to(dtype))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.01)])
def test_a_factor_is_not(dtype, factor):
    product = exact()[0]
    assert not agreement.agree((product * factor).to(dtype), product.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_nor_one_number_that_is_off_nor_another_shape_or_type_nor_nothing(dtype):
    product = exact()[0].to(dtype)
    other = product.clone()
    other[2, 7] += 3 * torch.finfo(dtype).eps * product.abs().max() + 1e-5 * product.abs().max()
    assert not agreement.agree(other, product)
    assert not agreement.agree(product[1:], product)
    assert not agreement.agree(product.double(), product)
    assert not agreement.agree(torch.full_like(product, torch.nan), product)
    assert agreement.agree(torch.zeros_like(product), torch.zeros_like(product))
