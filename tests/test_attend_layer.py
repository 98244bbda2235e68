"""The fused decode step of every backend that has one against the reference's parts on the same packed bytes."""

from dataclasses import replace

import pytest
import torch

from budget import assert_within_budget
from conftest import Model, using_backend
from method_cases import every_quantizer
from one_layer import OneLayer
from qjl import ops
from qjl.methods.balanced import Balanced
from qjl.methods.grid import RotatedGridCodec
from qjl.methods.nibble import NibbleCodec
from qjl.methods.transform import Transform
from qjl.methods.uniform import TokenUniform
from qjl.ops.cpu import attention
from qjl.ops.triton import runtime

pytestmark = pytest.mark.usefixtures("kernels")


class Asked:
    """A layer that holds all tokens of ``made`` but the last ones, which it reads in the pass at hand."""

    def __init__(self, key, value, made, queries=1, rope=None, padding=None, origins=None, mask=None):
        self.layer = OneLayer(key, value, rope=made.rope if rope is None else rope)
        self.made, self.queries = made, queries
        with using_backend("reference"):  # so that only the decode step is tested
            if padding is not None:
                self.layer.cache.set_padding(padding, origins or [0] * len(padding))
            if mask is not None:
                self.layer.cache.mark(mask)
            self.layer.step(made, slice(0, -queries))
            self.layer.append(made.keys[:, :, -queries:], made.values[:, :, -queries:])

    def attend(self, scale=1.0, **scoring):
        return self.layer.attend(scale * self.made.queries[:, :, -self.queries :].float(), **scoring)


def _asked(key, value, tokens, batch=1, heads=2, head_dim=64, group=3, **kwargs):
    model = Model(heads=heads, head_dim=head_dim, group=group)
    return Asked(key, value, model.tokens(torch.arange(tokens).expand(batch, -1)), **kwargs)


def _assert_right(asked, monkeypatch, times=1, **scoring):
    """Within the budget; the fused step must have been taken."""
    calls = []
    for name in ("append_attend", "attend"):
        own = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, own=own: calls.append(1) or own(*args))
    out = asked.attend(**scoring)
    assert calls
    with using_backend("reference"):
        expected = asked.attend(**scoring)
    assert torch.isfinite(out).all()
    assert_within_budget(out, expected, asked.layer.core.pages.operand, times)


@pytest.fixture
def assert_right(monkeypatch):
    return lambda asked, **scoring: _assert_right(asked, monkeypatch, **scoring)


def _with(role, quantizer, tokens=460, **kwargs):
    key, value = (quantizer, Balanced(2, metric=False)) if role == "key" else (Transform(2), quantizer)
    return _asked(key, value, tokens, **kwargs)


@every_quantizer
def test_every_method_with_a_nibble_form(role, quantizer, assert_right):
    asked = _with(role, quantizer)
    codec = asked.layer.core.codecs[role == "value"]
    if codec.form is None or not (role == "key" or codec.form.has_shared_code):
        assert role == "value" or not isinstance(codec, (NibbleCodec, RotatedGridCodec))
        return
    assert_right(asked, scaling=0.125 / 4)


@pytest.mark.parametrize("head_dim", [8, 80, 256] if runtime.is_interpreted() else [8, 64, 80, 96, 128, 256, 512])
def test_every_head_dim(head_dim, assert_right):
    asked = _asked(Transform(3), Balanced(2, "trellis", metric=False), 460, head_dim=head_dim)
    assert_right(asked, scaling=head_dim**-0.5)


@pytest.mark.parametrize("group", [1, 7] if runtime.is_interpreted() else [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_any_number_of_rows(group, tokens, assert_right):
    """Rows are taken four at a time; several query tokens are causal among themselves."""
    asked = _asked(Transform(2), Balanced(2, "trellis", metric=False), 460, group=group, queries=tokens)
    assert_right(asked)


@pytest.mark.parametrize("num_bits", [1, 2, 4])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_values_in_groups(num_bits, group_size, assert_right):
    assert_right(_with("value", TokenUniform(num_bits, group_size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_tokens_of_every_type(dtype, assert_right):
    made = Model(group=2).tokens(torch.arange(460)[None])
    made = replace(made, keys=made.keys.to(dtype), values=made.values.to(dtype))
    assert_right(Asked(Transform(2), Balanced(2, metric=False), made))


def test_soft_caps(assert_right):
    assert_right(_asked(Transform(2), Balanced(2, metric=False), 460), softcap=5.0)


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_by_row_head_and_query(heads, kind, assert_right):
    asked = _asked(Transform(2), Balanced(2, metric=False), 460, batch=2, queries=2)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(2, heads, 2, 460, generator=generator)
    mask = mask < 0.6 if kind == "bool" else mask.log()
    assert_right(asked, mask=mask)


def test_rows_of_different_lengths(assert_right):
    made = Model(group=2).tokens(torch.arange(460).expand(2, -1))
    asked = Asked(Transform(2), Balanced(2, metric=False), made, padding=[0, 150])
    mask = torch.ones(2, 1, 1, 460, dtype=torch.bool)
    mask[1, :, :, :150] = False
    assert_right(asked)
    assert_right(asked, mask=mask)


def test_a_cropped_block_does_not_count_what_was_cut(assert_right):
    asked = _asked(Transform(2), Balanced(2, metric=False), 460)
    asked.layer.cache.roll_back()
    asked.layer.cache.crop(300)
    asked.layer.append(asked.made.keys[:, :, 300:301], asked.made.values[:, :, 300:301])
    assert_right(asked)


def test_blocks_that_do_not_follow_each_other(assert_right):
    """A token mask leaves holes: positions jump from block to block."""
    mask = torch.ones(1, 600, dtype=torch.bool)
    mask[:, 100:130] = mask[:, 301:400] = False
    made = Model(group=2).tokens(torch.arange(600)[None])
    assert_right(Asked(Transform(2), Balanced(2, metric=False), made, mask=mask))


def test_one_token_that_takes_all_weight(assert_right):
    assert_right(_asked(Transform(3), Balanced(2, "trellis", metric=False), 460), scale=20, times=20)


def test_far_positions_turn_the_mean_exactly(assert_right):
    """Angles of ten million radians lose all digits but the first in float32."""
    made = Model(group=2).tokens(10_000_000 + torch.arange(460)[None])
    asked = Asked(Transform(2), Balanced(2, metric=False), made, padding=[0], origins=[10_000_000])
    assert_right(asked)


def test_the_number_of_threads_changes_nothing(cpu_kernels):
    asked = _asked(Transform(3), Balanced(2, "trellis", metric=False), 3000, batch=2)
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(asked.attend())
    torch.set_num_threads(1)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_memory_of_a_step_hardly_grows_with_the_context(cpu_kernels):
    sizes = []
    for tokens in (500, 3000):
        asked = _asked(Transform(2), Balanced(2, metric=False), tokens, batch=8)
        attention.release()
        asked.attend()
        sizes.append(attention.held_bytes())
    assert sizes[1] < 1.2 * sizes[0]
