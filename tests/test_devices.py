"""The library on a GPU that is pretended (``pretended_gpu``): one device for all, and a step that does not wait."""

import pytest
import torch

from conftest import Model, using_backend
from qjl.attention import Scoring, attend
from qjl.cache import CacheLayer, LayerSource
from qjl.ops.triton import runtime
from qjl.presets import PRESETS, resolve

if not runtime.is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU here: nothing needs to be pretended", allow_module_level=True)

from pretended_gpu import on_gpu, on_host, pretended_gpu, watched

FUSED = [name for name in PRESETS if name != "full"]


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch):
        yield


def _layer(preset, rope):
    config = resolve(preset)
    key, value = config.for_layer(0)
    return CacheLayer(
        key, value, sinks=config.sinks, recent=config.recent, pre_rope=config.pre_rope, source=LayerSource(rope=rope)
    )


def _step(layer, tokens, place, mask=None):
    """Appends tokens and lets them attend, as an engine does."""
    layer.append(tokens.keys[:, :, place], tokens.values[:, :, place])
    query = tokens.queries[:, :, place]
    out = attend(query, layer, Scoring(0.125, mask))
    if layer.wants_queries:
        layer.observe(query, out)
    layer.settle()
    return out


@pytest.mark.parametrize("preset", FUSED)
def test_a_preset(preset, gpu):
    with using_backend("reference"):
        model = Model()
        tokens = model.first_tokens(420, batch=2)
        there = type(tokens)(*on_gpu((tokens.keys, tokens.values, tokens.queries)), tokens.rope)
        a, b = _layer(preset, model.rope), _layer(preset, model.rope)
        for place in [slice(0, 300), slice(300, 303), *(slice(i, i + 1) for i in range(303, 420))]:
            with watched() as w:
                x, y = _step(a, tokens, place), _step(b, there, place)
            print(place, w)
            torch.testing.assert_close(x, on_host(y))
