"""What the caller sets in torch changes nothing here: default dtype and device, autocast, inference mode and more."""

import ast
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from method_cases import one_of_each_codec, without_statistics
from qjl import ops
from qjl.methods.base import LayerContext
from qjl.methods.quarot import QuaRot
from qjl.ops.forms import ExactPool, Pool, Rows
from qjl.packed import BLOCK
from qjl.presets import PRESETS
from qjl.statistics import AttentionMoments, layer_statistics

SOURCE = Path(__file__).parent.parent / "src" / "qjl"
APART = {"lab"}  # which measures, and is no library
FACTORIES = {
    *("zeros", "ones", "empty", "full", "rand", "randn", "normal", "eye", "linspace", "logspace", "tensor"),
    *("scalar_tensor", "empty_strided", "hann_window"),
}
HEADS, GROUP, DIM, TOKENS = 2, 2, 64, 2 * BLOCK


def _factories(path):
    """Calls of torch that make numbers of the default dtype where they are not told another."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name("torch"), attr=attr)) if attr in FACTORIES:
                yield node


def test_every_tensor_is_told_its_type():
    files = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in APART]
    untold = [
        f"{path.relative_to(SOURCE)}:{call.lineno}: {ast.unparse(call)}"
        for path in files
        for call in _factories(path)
        if "dtype" not in {keyword.arg for keyword in call.keywords}
    ]
    assert not untold


@contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


MODES = {
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "float16": lambda: _default_dtype(torch.float16),
    "float64": lambda: _default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "deterministic": _deterministic,
}


@contextmanager
def _all_at_once():
    with MODES["bfloat16"](), MODES["autocast"](), MODES["inference"](), MODES["deterministic"]():
        yield


def _forget():
    """What earlier calls have made, in another mode."""
    rooms = ("qjl.codebook", "qjl.sketch", "qjl.trellis", "qjl.methods")
    for name, module in list(sys.modules.items()):
        if name.startswith(rooms):
            for made in vars(module).values():
                if hasattr(made, "cache_clear"):
                    made.cache_clear()


def _of_layer(preset, model):
    """All that the codecs of a layer give."""
    tokens = model.first_tokens(TOKENS)
    statistics, first = model.statistics(), torch.arange(0, TOKENS, BLOCK)[None]

    def run():
        given = {}
        forms = []
        for role, quantizer, x in (("key", preset.key, tokens.keys), ("value", preset.value, tokens.values)):
            context = LayerContext(role, HEADS, DIM, torch.device("cpu"), torch.float32, statistics, model.rope)
            codec = quantizer.fit(context)
            blocks = codec.encode_tokens(x, first)
            given |= {f"{role} {name}": field for name, field in blocks.items()}
            given[f"{role} decoded"] = codec.dequantize(blocks, first)
            forms.append((blocks, codec.form))
        (keys, key_form), (values, value_form) = forms
        query = tokens.grouped_queries()[:, :, :GROUP].contiguous()
        if key_form is not None and value_form is not None and value_form.has_shared_code:
            pool = Pool(*(_pages(x) for x in (keys, values)), key_form, value_form)
            exact = ExactPool(*(x[0].transpose(0, 1).contiguous() for x in (tokens.keys, tokens.values)))
            given["out"], given["lse"] = ops.attend(query, pool, exact, _all_tokens(), 1, 0.1)
        return given

    return run


def _pages(blocks):
    """``[1, H, blocks, ...] -> [blocks, H, ...]``."""
    return {name: field[0].transpose(0, 1) for name, field in blocks.items()}


def _all_tokens():
    """One row with all of them, packed and exact."""
    pages, slots = (torch.arange(count, dtype=torch.int32)[None] for count in (TOKENS // BLOCK, TOKENS))
    none, origin = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    return Rows(pages, none + TOKENS, none, origin, slots, none + TOKENS, longest=TOKENS)


TIES = 5e-3  # of tokens, that lie at the edge of two codes and fall to either side


def _assert_same(found, expected):
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in expected.items()}
    differ = [name for name, x in found.items() if _share_of_others(x, expected[name]) > TIES]
    assert not differ


def _share_of_others(x, expected):
    return float(((x.double() - expected.double()).abs() > 1e-3).float().mean())


@pytest.mark.parametrize("preset", one_of_each_codec())
def test_codecs_are_the_same_in_every_mode(preset, model_of):
    run = _of_layer(PRESETS[preset], model_of(HEADS, DIM, GROUP))
    _forget()
    expected = run()
    for mode in (MODES["float64"], _all_at_once):  # fitting takes long
        _forget()
        with mode():
            found = run()
        _assert_same(found, expected)
    _assert_same(run(), expected)  # with what was made in those modes
    _forget()


def test_statistics_are_the_same_in_every_mode(model_of):
    model = model_of(HEADS, DIM, GROUP)
    tokens = model.first_tokens(300)
    positions, valid = torch.arange(300)[None], torch.ones(1, 300, dtype=torch.bool)

    def measured():
        attention = AttentionMoments()
        attention.add(tokens.queries, tokens.queries, positions, valid, model.rope, HEADS)
        statistics = layer_statistics(tokens.keys, tokens.values, positions, valid, attention, model.rope)
        return {name: x for name, x in vars(statistics).items() if isinstance(x, torch.Tensor)}

    expected = measured()
    for mode in MODES.values():
        with mode():
            found = measured()
        _assert_same(found, expected)


@pytest.mark.parametrize("mode", [*MODES, "device"])
def test_ops_are_the_same_in_every_mode(backend, mode):
    codec, x = without_statistics(QuaRot(3, 8), HEADS), torch.randn(1, HEADS, BLOCK, DIM)
    first = torch.zeros(1, 1, dtype=torch.int64)

    def run():
        blocks = codec.encode_tokens(x, first)
        return *blocks.values(), codec.dequantize(blocks, first)

    expected = run()
    if mode == "device" and backend == "reference":
        pytest.skip("torch's own operations lie where torch says")
    with torch.device("meta") if mode == "device" else MODES[mode]():
        found = run()
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(found, expected, strict=True))


def test_a_new_method_is_guarded_as_ours_are():
    """By its base, so that nobody has to remember."""
    from qjl.methods.base import Codec

    class Product(Codec):
        def quantize(self, x, first):
            return {"codes": x @ x.transpose(2, 3)}

        def dequantize(self, blocks, first):
            return blocks["codes"] @ blocks["codes"]

    x = torch.randn(1, 1, 8, 8)
    for caller in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with caller:
            blocks = Product().quantize(x, None)
            assert blocks["codes"].dtype == Product().dequantize(blocks, None).dtype == torch.float32
