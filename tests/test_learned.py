"""What a method learns of a layer: plain arrays by name, from which the codec is built again without statistics."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from method_cases import every_quantizer, of_presets
from qjl.methods.balanced import Balanced
from qjl.methods.kvquant import KVQuant
from qjl.methods.transform import Transform

PLAIN = {torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32}


def unlearned(case):
    """The layer of a case, nothing known of its tokens."""
    return replace(case.context, statistics=None)


@every_quantizer
def test_a_codec_is_built_again_from_its_learned_arrays_alone(role, quantizer, fitted, tmp_path):
    case = fitted(role, quantizer, 64)
    learned = case.learned
    assert all(name.isidentifier() for name in learned)
    assert all(array.is_contiguous() and array.dtype in PLAIN for array in learned.values())
    assert quantizer.needs_statistics or not learned
    save_file(learned, tmp_path / "learned.safetensors")
    codec = quantizer.build(unlearned(case), load_file(tmp_path / "learned.safetensors"))
    blocks = codec.quantize(case.x, case.first)
    before = case.codec.quantize(case.x, case.first)
    assert blocks.keys() == before.keys()
    assert all(torch.equal(blocks[name], before[name]) for name in blocks)
    assert torch.equal(codec.dequantize(blocks, case.first), case.codec.dequantize(blocks, case.first))


@every_quantizer
def test_arrays_that_are_missing_or_do_not_fit_are_refused(role, quantizer, fitted, refuses):
    case = fitted(role, quantizer, 64)
    learned = case.learned
    for name, array in learned.items():
        with refuses(f"the {role} codec has no learned array '{name}'"):
            quantizer.build(unlearned(case), {one: learned[one] for one in learned if one != name})
        for other in (array[None], array.to(torch.complex64)):
            with refuses(f"the learned array '{name}' of the {role} codec is {other.dtype}"):
                quantizer.build(unlearned(case), learned | {name: other})


@pytest.mark.parametrize("quantizer", [Balanced(2), Transform(2), KVQuant(3)], ids=str)
@pytest.mark.parametrize("is_rotary", [False, True])
def test_the_rope_of_what_was_learned_of_keys_goes_with_it(quantizer, is_rotary, fitted):
    """Also where the cache takes the keys before RoPE, and the codec itself turns nothing."""
    case = fitted("key", quantizer, 64)
    statistics = replace(case.statistics, is_rotary=is_rotary)
    for ropes in ({"rope": case.rope}, {"rope": None, "undone": case.rope}):
        context = replace(case.context, statistics=statistics, **ropes)
        learned = quantizer.learn(context)
        assert bool(learned["is_rotary"]) == is_rotary
        one, other = quantizer.fit(context), quantizer.build(replace(context, statistics=None), learned)
        blocks = other.quantize(case.x, case.first)
        assert torch.equal(one.dequantize(blocks, case.first), other.dequantize(blocks, case.first))
        assert all(torch.equal(blocks[name], field) for name, field in one.quantize(case.x, case.first).items())


def test_what_the_presets_learn_of_a_layer(fitted):
    """Its names, as files of caches have them."""
    learned = defaultdict(set)
    for role, quantizer in set(of_presets()):
        learned[role, quantizer.method] |= fitted(role, quantizer, 64).learned.keys()
    mean, maps = {"mean", "is_rotary"}, {"key_map", "query_map"}
    assert {case: names for case, names in learned.items() if names} == {
        ("key", "transform"): {*mean, *maps, "bits", "weights"},
        ("key", "balanced"): {*mean, *maps},
        ("value", "balanced"): {"mean", "unit"},
        ("key", "rabitq"): mean,
        ("value", "rabitq"): {"mean"},
        ("key", "kvquant"): {"edges", "levels", "middle", "reach", "is_rotary"},
        ("value", "kvquant"): {"edges", "levels"},
        ("key", "oscar"): {"rotation"},
        ("value", "oscar"): {"rotation"},
        ("key", "turboesm"): {"rotation", "edges", "levels"},
        ("value", "turboesm"): {"edges", "levels"},
        ("key", "turboquant"): {"channels"},
        ("value", "turboquant"): {"channels"},
    }
