"""The modes a caller is in do not reach into the cache: compilation, autocast, dtypes, threads, and others."""

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

import qjl
from models_for_tests import difference, exact, generate, left_padded, packed_bytes, prompt, read, tiny
from one_layer import codec_tensors
from qjl.compat import Uncompiled, cache_argument
from qjl.hf import own_codecs

KINDS = ("full", "b3", "qjl-2", "kivi-2", "b2-pre", "int8")  # every way in which tokens are stored and read


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJL_CACHE", str(tmp_path))


# Compilation


@pytest.mark.parametrize("preset", KINDS)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("how", ["forward", "model"])
def test_a_compiled_model_writes_the_same_text(how, backend, preset):
    model, compiled = tiny(layers=1), tiny(layers=1)
    expected = generate(model, prompt(), cache=qjl.KVCache(model, preset))
    cache = qjl.KVCache(compiled, preset)
    if how == "model":
        compiled.compile(backend=backend)
    else:
        compiled.forward = torch.compile(compiled.forward, backend=backend)
    assert generate(compiled, prompt(), cache=cache).equal(expected)
    qjl.enable(compiled, preset)
    assert generate(compiled, prompt()).equal(expected)


def test_a_forward_pass_of_a_compiled_model_reads_the_same_codes():
    model, compiled, ids = tiny(layers=1), tiny(layers=1), prompt()
    caches = qjl.KVCache(model, "b3"), qjl.KVCache(compiled, "b3")
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    logits = [read(one, ids, cache, (290,)) for one, cache in zip((model, compiled), caches, strict=True)]
    assert logits[0].equal(logits[1])
    assert all(map(torch.equal, packed_bytes(caches[0]), packed_bytes(caches[1])))


def test_compiled_code_runs_again_afterwards():
    """The stance is the user's as soon as the last one of several that overlap has ended."""
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    torch.compiler.reset()
    function = torch.compile(lambda x: x + 1, backend=backend)
    outer, inner = Uncompiled(), Uncompiled()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__()
    function(torch.ones(1))
    assert not calls
    inner.__exit__()
    function(torch.ones(1))
    assert calls


# Autocast and dtypes


@pytest.mark.parametrize("preset", KINDS)
def test_codes_under_autocast_are_those_of_the_same_tokens(preset):
    """What the layers are given is rounded by autocast; what is made of it is not."""
    model, ids = tiny(), prompt(320)
    given = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: given.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        reference = exact(model, ids, (300,))
        cache = qjl.KVCache(model, preset)
        logits = read(model, ids, cache, (300,))
    assert torch.bfloat16 in given
    assert difference(logits.float(), reference.float()) < 0.6
    assert cache.packed_tokens[0] >= 320 - cache.config.sinks - cache.config.recent - 63
    outside = qjl.KVCache(model, preset)
    read(model, ids, outside, (300,))
    inside = cache.layers[0].keys
    with torch.autocast("cpu", torch.bfloat16):
        again = qjl.KVCache(model, preset)
        read(model, ids, again, (300,))
    assert again.layers[0].keys.equal(inside)


@pytest.mark.parametrize("preset", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_code(preset, dtype):
    model, ids = tiny(), prompt(300)
    expected = qjl.KVCache(tiny(), preset)
    logits = read(tiny(), ids, expected, (290,))
    cache = qjl.KVCache(model, preset)
    torch.set_default_dtype(dtype)
    try:
        ours = read(model, ids, cache, (290,))
        late = qjl.KVCache(model, preset)
        read(model, ids, late, (290,))
    finally:
        torch.set_default_dtype(torch.float32)
    for one in (cache, late):
        assert all(map(torch.equal, packed_bytes(one), packed_bytes(expected)))
    assert difference(ours, logits) < 1e-5


@pytest.mark.parametrize("preset", KINDS)
def test_a_model_in_double_precision(preset):
    model, ids = tiny(dtype=torch.float64), prompt(300)
    cache = qjl.KVCache(model, preset)
    logits = read(model, ids, cache, (290,))
    assert logits.dtype == torch.float64
    assert difference(logits, exact(model, ids, (290,))) < 0.6
    single = copy.deepcopy(model).float()
    assert difference(logits.float(), read(single, ids, qjl.KVCache(single, preset), (290,))) < 2e-2


def test_a_mask_in_another_dtype_than_the_model():
    """As 4-D masks of floats come from users: read in steps, bool and float alike."""
    model, ids = tiny(), torch.cat([prompt(200), prompt(200, seed=1)])
    seen = torch.ones(200, 200, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    results = []
    for dtype in (torch.bool, torch.float32, torch.bfloat16):
        lowest = None if dtype == torch.bool else torch.finfo(dtype).min
        mask = seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, lowest)
        cache = qjl.KVCache(model, "full")
        with torch.no_grad():
            for step in (slice(0, 150), slice(150, 190), slice(190, 191), slice(191, 200)):
                inputs = {"input_ids": ids[:, step], "attention_mask": mask[:, :, step, : step.stop]}
                logits = model(**inputs, **cache_argument(cache)).logits
        results.append(logits)
    for logits in results[1:]:
        torch.testing.assert_close(logits, results[0], atol=2e-5, rtol=1e-4)


# Other modes


@pytest.mark.parametrize("preset", KINDS)
def test_deterministic_algorithms_change_nothing(preset):
    model = tiny()
    expected = generate(model, prompt(), cache=qjl.KVCache(model, preset))
    torch.use_deterministic_algorithms(True)
    try:
        fresh = tiny()
        assert generate(fresh, prompt(), cache=qjl.KVCache(fresh, preset)).equal(expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_mode_in_all_orders():
    model = tiny()
    expected = generate(model, prompt(), cache=qjl.KVCache(model, "b3"), tokens=40)
    fresh = tiny()
    cache = qjl.KVCache(fresh, "b3")
    with torch.inference_mode():
        first = generate(fresh, prompt(), cache=cache, tokens=20)
    text = torch.cat([prompt(), first], dim=1)
    second = generate(fresh, text, cache=cache, tokens=20)
    assert torch.cat([first, second], dim=1).equal(expected)


# Threads

BARRIER = 8


def in_threads(work, count=BARRIER):
    """Results of ``work(index)`` in threads that begin at once."""
    gate, results = threading.Barrier(count), {}

    def run(index):
        gate.wait()
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures = [result for result in results.values() if isinstance(result, Exception)]
    if failures:
        raise failures[0]
    return [results[index] for index in range(count)]


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    qjl.ops.use_backend(request.param)
    yield request.param
    qjl.ops.use_backend("auto")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("preset", KINDS)
def test_threads_on_a_fitted_model_write_what_they_write_alone(preset):
    model, prompts = tiny(), [prompt(280 + 10 * index, seed=index) for index in range(BARRIER)]
    read(model, prompt(300, seed=99), qjl.KVCache(model, preset))
    qjl.enable(model, preset)
    alone = [generate(model, ids, tokens=30) for ids in prompts]
    for _ in range(3):
        together = in_threads(lambda index: generate(model, prompts[index], tokens=30))
        assert all(map(torch.equal, together, alone))


def cache_of(model, preset, is_sharing):
    return qjl.KVCache(model, preset, codecs=None if is_sharing else own_codecs(model, qjl.PRESETS[preset]))


@pytest.mark.parametrize("preset", KINDS)
@pytest.mark.parametrize("share", [True, False])
def test_first_prompts_at_once_are_sane(preset, share):
    """One of them gives the statistics, and each stays with the codecs that it was packed with."""
    prompts = [prompt(330, seed=index) for index in range(4)]
    for _ in range(2):
        model = tiny()
        exact_logits = [exact(model, ids, (300,)) for ids in prompts]
        caches = [cache_of(model, preset, share) for _ in prompts]
        logits = in_threads(lambda index, c=caches, m=model: read(m, prompts[index], c[index], (300,)), len(prompts))
        for ours, reference in zip(logits, exact_logits, strict=True):
            assert difference(ours, reference) < 0.3
        if share:
            maps = {
                codec_tensors(core)[0].data_ptr() for cache in caches for core in cache.cores[:1] if codec_tensors(core)
            }
            assert len(maps) <= 1, "one thread fits for all"


def test_padded_batches_and_plain_prompts_in_threads():
    model = tiny()
    read(model, prompt(300, seed=99), qjl.KVCache(model, "b3"))
    batches = [left_padded([prompt(250 + index), prompt(200, seed=index)]) for index in range(BARRIER)]
    qjl.enable(model, "b3")

    def work(index):
        return model.generate(**batches[index], max_new_tokens=12, do_sample=False)

    alone = [work(index) for index in range(BARRIER)]
    assert all(map(torch.equal, in_threads(work), alone))


@pytest.mark.model
@pytest.mark.usefixtures("backend")
def test_eight_threads_stream_sixteen_prompts(monkeypatch):
    """On one enabled model, each thread with a streamer of its own."""
    monkeypatch.delenv("QJL_CACHE")
    model, tokenizer = qjl.load("smollm2")
    texts = [f"Chapter {index}. The keeper counts the ships of day {index}. " * 9 for index in range(16)]
    inputs = [tokenizer(text, return_tensors="pt") for text in texts]
    qjl.enable(model, "b3")

    def write(index):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        model.generate(**inputs[index], max_new_tokens=6, do_sample=False, streamer=streamer)
        return "".join(streamer)

    try:
        first = tokenizer(texts[0] * 3, return_tensors="pt").input_ids
        read(model, first, qjl.KVCache(model, "b3"), (first.shape[1],))
        alone = [write(index) for index in range(16)]
        together = in_threads(lambda thread: [write(index) for index in range(thread, 16, BARRIER)])
    finally:
        qjl.disable(model)
    for thread, written in enumerate(together):
        assert written == alone[thread::BARRIER]


FORKED = """
import os, sys, torch, qjl
from models_for_tests import generate, prompt, tiny
torch.set_num_threads(2)
model = qjl.enable(tiny(), sys.argv[1])
expected = generate(model, prompt())
child = os.fork()
if not child:
    os._exit(0 if generate(model, prompt()).equal(expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("preset", ["b3", "kivi-2"])
def test_a_forked_process_goes_on(preset):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", FORKED, preset], env=environment, timeout=600, check=True)


def test_a_given_dynamic_cache_is_no_matter_of_ours():
    """Everything but our caches is as it was, compiled or not."""
    model = qjl.enable(tiny(), "b3")
    compiled = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        assert compiled(prompt(50), **cache_argument(DynamicCache())).logits.equal(
            tiny()(prompt(50), **cache_argument(DynamicCache())).logits
        )
