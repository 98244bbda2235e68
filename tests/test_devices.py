"""The library on a GPU that is pretended (``pretended_gpu``): all tensors on one device, and steps that do not wait."""

from dataclasses import replace

import pytest
import torch

import qjl
from conftest import Model, using_backend
from method_cases import one_of_each_codec
from models_for_tests import generate, left_padded, prompt, tiny
from one_layer import OneLayer
from qjl import calibration
from qjl.cache.index import Capacity
from qjl.methods.balanced import Balanced
from qjl.methods.qjl import QJL
from qjl.methods.uniform import TokenUniform
from qjl.ops.triton import runtime
from qjl.presets import CacheConfig, resolve

if not runtime.is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from pretended_gpu import GPU, OnGpu, on_gpu, on_host, pretended_gpu, watched
from qjl.compat import cache_argument
from qjl.ops.triton import step as triton_step

not_interpreted = pytest.mark.skipif(runtime.is_interpreted(), reason="the kernels themselves are run by others")
SEES_A_GPU = torch.cuda.is_available() and not runtime.is_interpreted()
SINKS, RECENT = 4, 32
FUSED = {
    "b3": resolve("b3"),
    "b2": resolve("b2"),
    "qjl-2": resolve("qjl-2"),
    "quarot-3": resolve("quarot-3"),
    "turboquant-3": resolve("turboquant-3"),
    "rabitq-2": resolve("rabitq-2"),
    "hadamard sketch, uniform": CacheConfig(QJL(2, "hadamard"), TokenUniform(2)),
    "even trellis": CacheConfig(QJL(1), Balanced(2.5, "trellis", metric=False)),
}

fused_and_padded = pytest.mark.parametrize(
    ("name", "padding"), [*((name, (0, 50)) for name in FUSED), ("b3", (0, 0))], ids=str
)


@pytest.fixture
def gpu(monkeypatch):
    if SEES_A_GPU:
        pytest.skip("there is a GPU: nothing has to be pretended")
    with pretended_gpu(monkeypatch):
        yield


MIXED = {
    "operands": lambda here, there: here + there,
    "a list": lambda here, there: torch.cat([here, there]),
    "an index": lambda here, there: here[there.long()],
    "an operand in place": lambda here, there: there.mul_(here),
}
WAITING = {
    "a number": lambda there: there.sum().item(),
    "a truth": lambda there: bool(there.any()),
    "a list": lambda there: there.tolist(),
    "a mask": lambda there: there[there > 0],
    "list of indices": lambda there: there[[0, 1]],
    "to the host": lambda there: there.cpu(),
    "to the device": lambda there: torch.tensor([1.0, 2.0], device=there.device),
    "into a slice": lambda there: there[:2].copy_(torch.ones(2)),
}
FREE = {
    "a launch": lambda there: there[:2] * 2 + there.new_ones(2),
    "a copy": lambda there: torch.ones(2).to(there.device, non_blocking=True),
    "a gather": lambda there: there[torch.zeros(2, dtype=torch.int64, device=there.device)],
}


@not_interpreted
@pytest.mark.parametrize("name", MIXED)
def test_the_pretended_gpu_refuses_tensors_of_the_host(name, gpu):
    with pytest.raises(RuntimeError, match="device"):
        MIXED[name](torch.ones(3), torch.ones(3, device=GPU))


@not_interpreted
@pytest.mark.parametrize(
    ("operation", "waits"), [(f, 1) for f in WAITING.values()] + [(f, 0) for f in FREE.values()], ids=[*WAITING, *FREE]
)
def test_the_pretended_gpu_notes_waits(operation, waits, gpu):
    there = torch.ones(3, device=GPU)
    with watched() as seen:
        operation(there)
    assert len(seen.waits) == waits


def _layer(config, rope):
    config = replace(resolve(config), sinks=SINKS, recent=RECENT)
    return OneLayer(*config.for_layer(0), SINKS, RECENT, rope=rope, pre_rope=config.pre_rope)


def _pushed(tokens):
    return replace(tokens, **on_gpu({name: getattr(tokens, name) for name in ("keys", "values", "queries")}))


def _step(layer, tokens, start, stop, mask=None):
    return layer.step(tokens, slice(start, stop), mask=mask)


@not_interpreted
@pytest.mark.parametrize("preset", one_of_each_codec())
def test_a_gpu_holds_and_gives_what_a_cpu_does(preset, gpu, reference_backend):
    """One prompt, a few tokens at once, and one by one past the next block; the second row has left padding."""
    model = Model(head_dim=64)
    tokens = model.first_tokens(360, batch=2)
    host, there = _layer(preset, model.rope), _layer(preset, model.rope)
    for layer in (host, there):
        layer.cache.set_padding([0, 5], [0, 0])
    for start, stop in ((0, 300), (300, 355), (355, 356), (356, 359)):
        expected = _step(host, tokens, start, stop)
        found = _step(there, _pushed(tokens), start, stop)
        assert isinstance(found, OnGpu)
        torch.testing.assert_close(on_host(found), expected, rtol=1e-4, atol=1e-5)
    assert there.index.blocks == host.index.blocks == [5, 5]
    for row in range(2):
        before, after = host.pages(row), on_host(there.pages(row))
        assert len(before) == len(after)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, after, strict=True))


def _filled(config, length, padding=(0, 0)):
    """A layer on the GPU with so many tokens, and those that follow."""
    model = Model(head_dim=64)
    tokens = _pushed(model.first_tokens(length + 80, batch=2))
    layer = _layer(config, model.rope)
    layer.cache.set_padding(padding, [0, 0])
    _step(layer, tokens, 0, length)
    _step(layer, tokens, length, length + 1)  # makes what is made once
    return layer, tokens


@not_interpreted
@fused_and_padded
def test_a_step_with_triton_waits_for_nothing(name, padding, gpu):
    layer, tokens = _filled(FUSED[name], 330, padding)
    for count in (1, 3, 1):
        with watched() as seen:
            _step(layer, tokens, layer.length, layer.length + count)
        assert not seen.waits
        assert seen.launches


@not_interpreted
@pytest.mark.parametrize("preset", ["b2-pre", "kivi-2", "turboquant-prod-2", "fp8", "vidkv", "kvquant-3"])
def test_a_step_by_parts_waits_for_nothing(preset, gpu):
    layer, tokens = _filled(preset, 330, (0, 50))
    for count in (1, 3):
        with watched() as seen:
            _step(layer, tokens, layer.length, layer.length + count)
        assert not seen.waits


@not_interpreted
@pytest.mark.parametrize("is_bool", [True, False])
def test_a_masked_step_waits_for_nothing(is_bool, gpu):
    layer, tokens = _filled("b3", 330, (0, 50))
    mask = torch.ones(2, 1, 1, 332, dtype=torch.bool, device=GPU)
    with watched() as seen:
        _step(layer, tokens, 331, 332, mask if is_bool else mask.float())
    assert not seen.waits


@not_interpreted
@fused_and_padded
def test_what_a_step_with_triton_allocates_grows_by_coefficients_of_the_mean_alone(name, padding, gpu, monkeypatch):
    """Of each block that the table has room for: two digits of 32 functions and a factor, by query row."""
    monkeypatch.setattr(triton_step, "FILE", triton_step.REGISTERS[0][1])  # as many programs, however long
    monkeypatch.setattr(runtime, "processors", lambda device: 1)
    allocated, rooms = [], []
    for length in (330, 330 + 64 * 7):
        layer, tokens = _filled(FUSED[name], length, padding)
        _step(layer, tokens, length + 1, length + 2)
        with watched() as seen:
            _step(layer, tokens, length + 2, length + 3)
        allocated.append(seen.nbytes)
        rooms.append(layer.index.table.shape[1])
    batch, heads = tokens.keys.shape[:2]
    assert 0 < allocated[0] <= allocated[1]
    assert allocated[1] - allocated[0] <= (rooms[1] - rooms[0]) * batch * heads * triton_step.FEW_ROWS * (2 * 32 + 4)


@not_interpreted
@pytest.mark.parametrize("name", FUSED)
def test_with_a_fixed_length_every_step_is_the_same_work(name, gpu):
    """What a graph replays: the same kernels on the same grids, over the same tensors of the cache, and no wait."""
    model = Model(head_dim=64)
    tokens = _pushed(model.first_tokens(600, batch=2))
    layer = OneLayer(*FUSED[name].for_layer(0), SINKS, RECENT, rope=model.rope, capacity=Capacity(2, 600))
    _step(layer, tokens, 0, 330)
    seen = []
    for place in range(330, 450):
        with watched() as watch:
            layer.append(tokens.keys[:, :, place : place + 1], tokens.values[:, :, place : place + 1])
            layer.attend(tokens.queries[:, :, place : place + 1])
        layer.settle()
        seen.append(watch)
    first, later = seen[1], seen[2:]  # the first step makes what is made once
    kept = {x.data_ptr() for side in layer.core.pages.fields for x in side.values()}
    kept |= {layer.core.exact.keys.data_ptr(), layer.core.exact.values.data_ptr()}
    assert first.launches
    for watch in later:
        assert not watch.waits
        assert watch.grids == first.grids
        assert watch.nbytes == first.nbytes
        assert kept <= {place for places in watch.places for place in places}


@not_interpreted
@fused_and_padded
def test_packing_with_triton_waits_for_nothing_but_a_look_at_the_numbers(name, padding, gpu):
    layer, tokens = _filled(FUSED[name], 330, padding)
    before = sum(layer.packed_tokens)
    with watched() as seen:
        for place in range(331, 385):
            _step(layer, tokens, place, place + 1)
    assert sum(layer.packed_tokens) == before + 128
    assert {wait.split(":")[0] for wait in seen.waits} <= {"__init__.encode"}
    assert 0 < len(seen.waits) <= (4 if padding[1] else 2)  # keys and values of rows that are packed together


# Whole models


def _there(model):
    """The model on the GPU."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: _constant(tensor) for name, tensor in own.items() if tensor is not None})
    return model


def _constant(tensor):
    moved = OnGpu(tensor.detach())
    return torch.nn.Parameter(moved, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else moved


def _both(**inputs):
    """The same model and inputs on the CPU and on the GPU."""
    return (tiny(), inputs), (_there(tiny()), on_gpu(inputs))


@not_interpreted
@pytest.mark.parametrize(
    ("preset", "settings"), [("b3", {}), ("b3", {"num_beams": 2}), ("kivi-2", {})], ids=["b3", "beams", "kivi-2"]
)
def test_a_model_writes_the_same_on_a_gpu(preset, settings, gpu, reference_backend):
    texts, caches = [], []
    for model, inputs in _both(**left_padded([prompt(350), prompt(290, seed=1)])):
        caches.append(qjl.KVCache(model, preset))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        written = generate(model, ids, 6, cache=caches[-1], attention_mask=mask, **settings)
        texts.append(on_host(written))
    assert torch.equal(*texts)
    assert caches[0].packed_tokens == caches[1].packed_tokens
    assert caches[0].nbytes == caches[1].nbytes
    assert caches[0].codec_nbytes == caches[1].codec_nbytes


@pytest.mark.parametrize("preset", ["b3", "quarot-3"])
def test_a_model_writes_the_same_with_the_kernels_of_triton(preset, gpu):
    if not runtime.is_interpreted():
        pytest.skip("kernels run here under TRITON_INTERPRET=1 alone")
    texts = []
    with using_backend("reference"):
        model = tiny()
        texts.append(generate(model, prompt(260), 3, cache=qjl.KVCache(model, preset)))
    model = _there(tiny())
    with using_backend("triton"), watched() as seen:
        texts.append(on_host(generate(model, on_gpu(prompt(260)), 3, cache=qjl.KVCache(model, preset))))
    assert {"step", "packed_part"} & set(seen.launches)
    assert torch.equal(*texts)


@not_interpreted
@pytest.mark.parametrize("preset", ["b3", "kivi-2", "b2-pre"])
def test_a_token_of_a_model_waits_for_nothing(preset, gpu):
    model = _there(tiny())
    cache = qjl.KVCache(model, preset)
    ids = on_gpu(prompt(302))
    with torch.no_grad():
        for place in (slice(0, 300), slice(300, 301)):
            model(input_ids=ids[:, place], **cache_argument(cache))
        with watched() as seen:
            model(input_ids=ids[:, 301:], **cache_argument(cache))
    assert not seen.waits


@not_interpreted
def test_rows_are_reordered_after_one_wait(gpu, reference_backend):
    model = _there(tiny())
    cache = qjl.KVCache(model, "b3")
    with torch.no_grad():
        model(input_ids=on_gpu(prompt(300, 2)), **cache_argument(cache))
    chosen = torch.tensor([1, 1], device=GPU)
    with watched() as seen:
        cache.reorder_cache(chosen)
    assert seen.waits == ["kv_cache.reorder_cache: tolist"]


@not_interpreted
def test_statistics_of_a_model_are_those_of_a_cpu(gpu, reference_backend):
    measured = [calibration.model_statistics(model, inputs["ids"]) for model, inputs in _both(ids=prompt(300, 2))]
    for layer in measured[0]:
        for name, expected in vars(measured[0][layer]).items():
            torch.testing.assert_close(on_host(vars(measured[1][layer])[name]), expected, rtol=1e-3, atol=1e-4)
