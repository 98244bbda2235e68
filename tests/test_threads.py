"""Many threads at once, each the results that one has alone; and a forked child, which computes as its parent does."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from budget import assert_within_budget
from conftest import Model
from pages import Extent, operands, paged
from qjl.methods.base import LayerContext
from qjl.ops.cpu import library
from qjl.ops.forms import Derived
from qjl.packed import BLOCK
from qjl.presets import PRESETS

THREADS, ROUNDS, REPEATS = 4, 10, 3
LONGEST = 120  # seconds after which a child hangs and does not merely wait for a turn


def at_once(work, threads=THREADS):
    """What ``work(thread)`` gives, all threads let go together."""
    gate, given = threading.Barrier(threads), {}

    def run(thread):
        gate.wait()
        try:
            given[thread] = work(thread)
        except BaseException as error:  # told by the thread that waits
            given[thread] = error

    running = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    failed = [given[thread] for thread in range(threads) if isinstance(given[thread], BaseException)]
    if failed:
        raise failed[0]
    return [given[thread] for thread in range(threads)]


def _fresh(pool):
    """The same pages and forms, of which no backend has made anything."""
    return replace(
        pool, **{name: replace(getattr(pool, name), derived=Derived()) for name in ("key_form", "value_form")}
    )


def _assert_same(found, expected):
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.fixture(params=[1, 3], ids=["one thread each", "three threads each"])
def team(request):
    """So many threads for each operation: the pool serves one of those that come at once."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made():
    preset = PRESETS["b3"]
    return operands(preset.key, preset.value, tokens=1500)


def test_steps_over_a_form_that_all_meet_first(kernels, team, made):
    step = paged(made, 64, Extent.of([1400]), torch.Generator())

    def attend(pool):
        return replace(step, pool=pool).attend()

    expected = attend(_fresh(step.pool))
    for _ in range(ROUNDS):
        form = _fresh(step.pool)  # whose arrays are made by all at once, and pointed to by all
        own = [replace(form) for _ in range(THREADS)]
        for given in at_once(lambda thread, own=own: [attend(own[thread]) for _ in range(REPEATS)]):
            for found in given:
                _assert_same(found, expected)


def test_steps_over_pages_that_all_share(backend, team, made):
    step = paged(made, 64, Extent.of([1400, 900, 64], [4, 0, 0], [0, 0, 0]), torch.Generator())
    rounds = ROUNDS if backend != "reference" else 2
    expected = step.attend()
    for _ in range(rounds):
        shared = replace(step, pool=_fresh(step.pool), rows=replace(step.rows))
        for found in at_once(lambda _, shared=shared: shared.attend()):
            _assert_same(found, expected)


@pytest.mark.parametrize("preset", ["b3", "qjl-2", "quarot-4", "turboquant-3"])
def test_codecs_that_all_fit_and_encode(backend, preset):
    if backend not in ("reference", f"cpu-{library.instruction_sets()[-1]}"):
        pytest.skip("one set of instructions is as good as another")
    chosen, model = PRESETS[preset], Model(2, 32, 2)
    tokens, statistics, first = model.first_tokens(2 * BLOCK), model.statistics(), torch.tensor([[0, BLOCK]])

    def fit():
        sides = {}
        for role, quantizer in (("key", chosen.key), ("value", chosen.value)):
            context = LayerContext(role, 2, 32, torch.device("cpu"), torch.float32, statistics, model.rope)
            sides[role] = quantizer.fit(context)
        return sides

    def encode(codecs):
        given = []
        for role, x in (("key", tokens.keys), ("value", tokens.values)):
            blocks = codecs[role].encode_tokens(x, first)
            given += [*blocks.values(), codecs[role].dequantize(blocks, first)]
        return given

    expected = encode(fit())
    _forget()
    for found in at_once(lambda _: encode(fit())):  # what is kept for all is made by all at once
        _assert_same(found, expected)
    shared = fit()
    for found in at_once(lambda _: encode(shared)):  # and so is what a codec makes at its first use
        _assert_same(found, expected)


def _forget():
    """The tables that all codecs share."""
    rooms = ("qjl.codebook", "qjl.sketch", "qjl.trellis", "qjl.methods")
    for name, module in list(sys.modules.items()):
        if name.startswith(rooms):
            for kept in vars(module).values():
                if hasattr(kept, "cache_clear"):
                    kept.cache_clear()


def test_room_fits_whatever_the_instruction_set_when_it_is_used(made):
    """Another thread may choose another one between two steps, and needs more room."""
    if not library.is_installed() or len(library.instruction_sets()) < 2:
        pytest.skip("there is only one")
    step, before = paged(made, 64, Extent.of([1400]), torch.Generator()), library.instruction_set()
    names = library.instruction_sets()
    stop = threading.Event()

    def switch():
        while not stop.is_set():
            for name in names:
                library.use_instruction_set(name)

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        results = [step.attend()[0] for _ in range(300)]
    finally:
        stop.set()
        switching.join()
        library.use_instruction_set(before)
    for found in results:
        assert_within_budget(found, results[0], step.pool, times=2)  # each may be off to its own side


# Forked children

CHILD = """
import json, os, sys, threading
import torch
sys.path.insert(0, "tests")
from pages import Extent, operands, paged
from qjl import ops
from qjl.presets import PRESETS

ops.use_backend(sys.argv[1])
torch.set_num_threads(4)
preset = PRESETS["b3"]
made = operands(preset.key, preset.value, tokens=1500)
step = paged(made, 64, Extent.of([1400]), torch.Generator())
codec, x = made.packed.key_codec, torch.randn(1, 2, 16 * 64, 64)
first = torch.arange(16)[None] * 64

def work():
    scores, out = codec.dequantize(codec.encode_tokens(x, first), first), step.attend()[0]
    return [float(scores.double().sum()), float(out.double().sum())]

def busy():
    while not done.is_set():
        work()

done = threading.Event()
others = [threading.Thread(target=busy) for _ in range(2)]
[thread.start() for thread in others]
expected = work()
ends = []
for _ in range(8):  # while others are in the middle of it
    child = os.fork()
    if not child:
        os._exit(0 if work() == expected and work() == expected else 3)
    ends.append(child)
ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ends]
done.set()
[thread.join() for thread in others]
print(json.dumps([ends, work() == expected]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
def test_a_forked_child_computes_what_its_parent_does(backend_name):
    if backend_name == "cpu" and not library.is_installed():
        pytest.skip("the kernels were not compiled")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, backend_name],
        capture_output=True, text=True, timeout=LONGEST, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[0] * 8, True]
