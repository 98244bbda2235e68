"""A tensor through a preset's codes."""

import pytest
import torch

import qjl
from qjl.presets import PRESETS


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("role", ["key", "value"])
def test_every_preset_codes_a_tensor(preset, role, generator):
    x = torch.randn(2, 3, 130, 64, generator=generator) + 1
    coded = qjl.quantize(x, preset, role)
    decoded = coded.dequantize()
    assert decoded.shape == x.shape
    assert decoded.dtype == x.dtype
    quantizer = getattr(PRESETS[preset], role)
    width = 2 if preset == "full" else 1  # the tensor is float32
    assert coded.bits == pytest.approx(quantizer.bits(64) * width * 192 / 130)
    assert torch.corrcoef(torch.stack([decoded.flatten(), x.flatten()]))[0, 1] > 0.45


@pytest.mark.parametrize("shape", [(64, 64), (4, 100, 64), (2, 4, 65, 64), (2, 2, 4, 64, 64)])
def test_any_number_of_dimensions(shape, generator):
    x = torch.randn(*shape, generator=generator).bfloat16()
    decoded = qjl.quantize(x, "int8").dequantize()
    torch.testing.assert_close(decoded, x, rtol=0, atol=0.1)


def test_estimates_of_scores_are_better_in_the_directions_of_queries(generator):
    stretch = torch.linspace(4, 0.1, 64)
    keys = torch.randn(1, 2, 2048, 64, generator=generator)
    queries = torch.randn(1, 4, 512, 64, generator=generator) * stretch
    grouped = queries.unflatten(1, (2, 2)).flatten(2, 3)

    def error(coded):
        return ((coded.dequantize() - keys) @ grouped.transpose(2, 3)).square().mean()

    assert error(qjl.quantize(keys, "b2", queries=queries)) < 0.7 * error(qjl.quantize(keys, "b2"))


def test_what_cannot_be_coded_is_told(refuses):
    x = torch.randn(64, 64)
    with refuses("floats [..., T, D]"):
        qjl.quantize(x.long())
    with refuses("give 'key' or 'value'"):
        qjl.quantize(x, role="query")
    with refuses("NaN or Inf"):
        qjl.quantize(x / 0)
    with refuses("must be a multiple of 8"):
        qjl.quantize(torch.randn(64, 30), "int8")
    for shape in ((3, 5, 10, 64), (10, 32)):
        with refuses("are not those of tokens"):
            qjl.quantize(x, queries=torch.randn(shape))
    for queries in (x[:0], x.long(), x[0]):
        with refuses("queries are floats [..., Q, D]"):
            qjl.quantize(x, queries=queries)
    with refuses("the queries"):
        qjl.quantize(x, queries=x / 0)
    with refuses("say nothing of values"):
        qjl.quantize(x, role="value", queries=x)
