"""The error budget of codes, and the cpu kernels within it on the activations of a real model."""

import pytest
import torch

import qjl
from budget import WORST, relative_errors
from conftest import using_backend
from models_for_tests import read
from pages import Extent, operands, paged
from qjl import corpora, ops
from qjl.methods.balanced import Balanced
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.methods.transform import Transform

PROMPT, ANSWERS = 400, 16
FORMS = {
    "sketch": (QJL(4), 1, 4e-3),
    "1.5 bits": (Transform(1.5), 1.5, 4e-3),
    "3 bits": (Transform(3), 3, 4e-3),
    "3.5 bits": (Transform(3.5), 3.5, 2e-3),
    "4 bits": (Transform(4), 4, 2e-3),
    "groups": (QuaRot(4, 16), 4, 2e-3),
    "8 bits": (Transform(8), 8, 1e-3),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_budget_follows_the_bits_of_a_code(name):
    quantizer, bits, budget = FORMS[name]
    form = operands(quantizer, QuaRot(2)).packed.key_codec.form
    assert form.bits == bits
    assert form.error_budget == budget


@pytest.mark.parametrize(("key", "value", "budget"), [(4, 2, 4e-3), (3, 4, 4e-3), (4, 4, 2e-3)])
def test_of_keys_and_values_the_coarser_rule(key, value, budget, generator):
    made = operands(Transform(key), Balanced(value, "trellis", metric=False))
    assert paged(made, 64, Extent.of([300]), generator).pool.error_budget == budget


@pytest.fixture(scope="module")
def read_by_a_model():
    model, tokenizer = qjl.load("smollm2")
    ids = tokenizer(corpora.essays()[:3000], return_tensors="pt").input_ids[:, : PROMPT + ANSWERS]
    assert ids.shape[1] == PROMPT + ANSWERS
    qjl.enable(model, "b3")
    yield model, ids
    qjl.disable(model)


@pytest.mark.model
@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("preset", ["b2", "b3", "b4"])
def test_real_activations_are_within_the_budget(preset, read_by_a_model, monkeypatch):
    """Rows of all layers and heads. Where few tokens have all the weight their errors do not average out, so that the
    worst of many thousand rows tells little: one in a hundred may be off by more than a row of a test should."""
    model, ids = read_by_a_model
    errors, budgets, own = [], set(), ops.append_attend

    def compared(query, keys, values, pool, *others):
        out = own(query.float(), keys, values, pool, *others)
        with using_backend("reference"):
            truth = own(query.float(), keys, values, pool, *others)
        errors.append(relative_errors(out, truth).flatten())
        budgets.add(pool.error_budget)
        return out.to(query.dtype)

    monkeypatch.setattr(ops, "append_attend", compared)
    read(model, ids, qjl.KVCache(model, preset), (PROMPT, *[1] * ANSWERS))
    (budget,), errors = budgets, torch.cat(errors)
    assert len(errors) == 30 * 9 * ANSWERS
    assert errors.square().mean().sqrt() <= budget
    assert errors.quantile(0.99) <= WORST * budget
