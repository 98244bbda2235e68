"""What a configuration says about its cache."""

import pytest
import torch
import transformers

from models_for_tests import FAMILIES, config_of, tiny
from qjl.architecture import LayerShape, find_rope, layer_shapes, text_config
from qjl.compat import CACHE

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "other base": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}
GROWING = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
        "original_max_position_embeddings": 1024,
    },
}
INTERLEAVED = ("cohere", "glm")
PARTIAL = ("phi", "glm")


def rotated_keys(model, ids):
    """Keys of the last layer as the model itself caches them, and the same keys at position 0."""
    keys = []
    for position_ids in (torch.arange(ids.shape[1])[None], torch.zeros_like(ids)):
        with torch.no_grad():
            cache = model(ids, position_ids=position_ids, use_cache=True)[CACHE]
        keys.append(cache.layers[-1].keys)
    return keys


def one_layer(family, **settings):
    """With a single layer, keys depend on positions through RoPE alone."""
    layer_types = ["full_attention"] if family == "gemma3" else None
    return tiny(family, layers=1, **({"layer_types": layer_types} if layer_types else {}), **settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [(family, {}) for family in ("llama", "qwen3", "gemma", "gemma3", "phi", "phi3", "cohere", "glm")]
    + [("llama", {"rope_parameters": parameters}) for parameters in ROPES.values()],
    ids=["llama", "qwen3", "gemma", "gemma3", "phi", "phi3", "cohere", "glm", *ROPES],
)
def test_find_rope_is_the_models_own_rotation(family, settings):
    model = one_layer(family, **settings)
    ids = torch.randint(2, 100, (1, 200), generator=torch.Generator().manual_seed(0))
    rope = find_rope(model.config)
    keys, unrotated = rotated_keys(model, ids)
    positions = torch.arange(200)[None]
    scaled = unrotated.clone()
    scaled[..., : rope.rotary_dim] /= rope.scaling
    torch.testing.assert_close(rope.rotate(scaled, positions), keys, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(rope.unrotate(keys, positions), scaled, atol=1e-4, rtol=1e-3)
    assert rope.interleaved == (family in INTERLEAVED)
    assert (rope.rotary_dim < keys.shape[3]) == (family in PARTIAL)


def test_yarn_scales_what_it_rotates():
    assert find_rope(config_of("llama", rope_parameters=ROPES["yarn"])).scaling > 1.1


def test_each_kind_of_layer_has_its_own_rope():
    config = config_of("gemma3")
    local, whole = find_rope(config, "sliding_attention"), find_rope(config, "full_attention")
    assert not local.inv_freq.allclose(whole.inv_freq)


@pytest.mark.parametrize(
    "config",
    [
        *(config_of("llama", rope_parameters=parameters) for parameters in GROWING.values()),
        transformers.Qwen2VLTextConfig(
            hidden_size=128,
            num_attention_heads=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        ),
        config_of("gpt2"),
        config_of("opt"),
        transformers.BloomConfig(),
        transformers.JambaConfig(),
    ],
    ids=[*GROWING, "m-rope", "learned positions", "opt", "alibi", "none"],
)
def test_no_rope_where_no_fixed_rotation_describes_it(config):
    assert find_rope(config) is None


def test_longrope_that_does_not_grow_is_fixed():
    config = config_of("llama", rope_parameters=GROWING["longrope"] | {"long_factor": [1.0] * 16})
    assert find_rope(config) is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_cache(family):
    """Of the layers that transformers fills."""
    model = tiny(family)
    with torch.no_grad():
        cache = model(torch.full((1, 5), 3), use_cache=True)[CACHE]
    shapes = layer_shapes(model.config)
    assert [shape.index for shape in shapes] == list(range(len(cache.layers)))
    for shape, layer in zip(shapes, cache.layers, strict=True):
        if shape.kind.endswith("attention") and shape.kind != "linear_attention":
            assert layer.keys.shape == layer.values.shape == (1, shape.num_key_value_heads, 5, shape.head_dim)
        else:
            assert not shape.is_quantized


def test_a_window_is_told_with_its_size():
    assert layer_shapes(config_of("gemma2")) == [
        LayerShape(0, "sliding_attention", 2, 32, 128),
        LayerShape(1, "full_attention", 2, 32),
    ]


def test_layers_may_have_heads_of_their_own():
    config = config_of("qwen3", per_layer_config={1: {"num_attention_heads": 8, "num_key_value_heads": 4}})
    assert [shape.num_key_value_heads for shape in layer_shapes(config)] == [2, 4]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(), "t5 is an encoder-decoder model"),
        (transformers.MambaConfig(), "mamba has no attention layers"),
        (transformers.DeepseekV2Config(), "deepseek_v2 caches latents"),
        (config_of("mistral", sliding_window=64), "has no full-attention layers (only sliding_attention)"),
    ],
    ids=["encoder-decoder", "no attention", "latents", "only windows"],
)
def test_nothing_to_quantize(config, message, refuses):
    with refuses(message):
        layer_shapes(config)


def test_the_text_part_of_a_configuration():
    composite = transformers.Gemma3Config()
    assert text_config(composite) is composite.text_config
    assert layer_shapes(composite) == layer_shapes(composite.text_config)
