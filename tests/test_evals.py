"""What is measured is what a model gives that prefills and decodes by itself, however much of it is shared."""

import dataclasses
import math
import statistics

import pytest
import torch

import qjl
from models_for_tests import agreement, packed_bytes, prompt, tiny
from qjl import calibration, teacher_forcing
from qjl.compat import cache_argument
from qjl.hf import own_codecs
from qjl.lab import machine
from qjl.lab.evals import fidelity
from qjl.lab.evals.fidelity import FidelityProtocol
from qjl.lab.evals.frontier import Frontier, parse_bits, within
from qjl.lab.evals.widths import WIDTHS, every_width
from qjl.methods.balanced import Balanced
from qjl.methods.identity import Identity
from qjl.methods.qjl import QJL
from qjl.methods.uniform import TokenUniform
from qjl.presets import PRESETS, CacheConfig, resolve
from tiny_checkpoint import CONTEXT, byte_tokenizer

PREFIX = 300
SMALL = FidelityProtocol(prefix=256, decode=70, chunks=2, seeds=2)
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 35
PLAIN = CacheConfig(TokenUniform(4), TokenUniform(4), name="plain")
MODELS = ("llama", "gemma2", "qwen3-next", "lfm2")


@pytest.fixture(scope="module")
def model():
    return tiny(vocab_size=len(byte_tokenizer()), max_position_embeddings=CONTEXT)


def cache_of(model, config, statistics=None):
    """With codecs of its own, fitted to these statistics, or to its first prompt."""
    codecs = own_codecs(model, config) if statistics is None else own_codecs(model, config, statistics.get)
    return qjl.KVCache(model, config, codecs=codecs)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("preset", ["b3", "qjl-paper"])
def test_filled_caches_are_as_prefilled_by_the_model(family, preset):
    model, ids = tiny(family), prompt(PREFIX + 150, batch=2)
    config = dataclasses.replace(PRESETS[preset], recent=32)
    statistics = calibration.model_statistics(model, ids[:1, :PREFIX])
    reference = teacher_forcing.full_log_probabilities(model, ids, PREFIX)
    caches = [cache_of(model, config, statistics) for _ in range(2)]
    teacher_forcing.refill(caches[0], teacher_forcing.prefill(model, ids[:, :PREFIX]))
    with torch.inference_mode():
        model(input_ids=ids[:, :PREFIX], **cache_argument(caches[1]))
    assert agreement(*map(packed_bytes, caches)) > 0.999
    filled, prefilled = (teacher_forcing.compare(model, cache, ids, PREFIX, reference) for cache in caches)
    assert filled.kl.shape == (2, 149)
    assert filled.kl.mean() > 1e-6
    torch.testing.assert_close(filled.kl.mean(), prefilled.kl.mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(filled.nll, prefilled.nll, rtol=0, atol=1e-2)


@pytest.mark.parametrize("family", MODELS)
def test_a_filled_cache_in_full_precision_loses_nothing(family):
    model, ids = tiny(family), prompt(PREFIX + 100, batch=2)
    cache = cache_of(model, CacheConfig(Identity(), Identity()))
    exact = teacher_forcing.prefill(model, ids[:, :PREFIX])
    for _ in range(2):  # the second time after all that the first has decoded
        teacher_forcing.refill(cache, exact)
        assert exact.get_seq_length() == PREFIX
        reference = teacher_forcing.full_log_probabilities(model, ids, PREFIX)
        assert teacher_forcing.compare(model, cache, ids, PREFIX, reference).kl.max() < 1e-5


def test_statistics_measured_once_give_the_codes_of_a_first_prompt():
    model, ids = tiny(), prompt(PREFIX)
    first = cache_of(model, PRESETS["b3"])
    given = cache_of(model, PRESETS["b3"], calibration.model_statistics(model, ids))
    for cache in (first, given):
        with torch.no_grad():
            model(input_ids=ids, **cache_argument(cache))
    assert agreement(packed_bytes(first), packed_bytes(given)) == 1


def test_kl_and_the_rest_are_what_their_names_say(generator, monkeypatch):
    logits, full = torch.randn(2, 2, 7, 50, generator=generator).mul(4)
    targets = torch.randint(50, (2, 7), generator=generator)
    monkeypatch.setattr(teacher_forcing, "_SLICE_NUMBERS", 150)
    kl, nll, nll_full, same_top = teacher_forcing._agreement(logits, full.log_softmax(-1), targets)
    p, q = full.double().softmax(-1), logits.double().softmax(-1)
    torch.testing.assert_close(kl.double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-5)
    for got, probabilities in ((nll, q), (nll_full, p)):
        expected = -probabilities.gather(2, targets[..., None]).squeeze(2).log()
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert same_top.equal(p.argmax(-1) == q.argmax(-1))


def test_presets_do_not_touch_each_other(model):
    measured = fidelity.measure_fidelity(model, byte_tokenizer(), ["b3", "qjl-paper", PLAIN, "b3"], TEXT, SMALL)
    first, *_, last = measured
    assert first == last
    assert first["seeds"] == 2


def test_only_what_a_seed_can_change_is_measured_for_each(model):
    seeds, advanced = {}, []
    configs = [PLAIN, CacheConfig(QJL(2), TokenUniform(4), name="qjl"), CacheConfig(Balanced(3), TokenUniform(4))]
    for row in fidelity.measure_fidelity(model, byte_tokenizer(), configs, TEXT, SMALL, advanced.append):
        seeds[row["method_keys"]] = row["seeds"]
        assert row["kl_se"] > 0
    assert seeds == {"uniform": 1, "qjl": 2, "balanced": 2}
    assert sum(advanced) == len(configs) * SMALL.tokens


def test_a_single_chunk_has_no_error_whatever_the_number_of_seeds(model):
    protocol = dataclasses.replace(SMALL, chunks=1)
    for row in fidelity.measure_fidelity(model, byte_tokenizer(), [PLAIN, "b3"], TEXT, protocol):
        assert row["kl_se"] is None
        assert row["kl_of_chunks"] == [pytest.approx(row["kl"])]


def test_errors_are_those_over_chunks_of_means_over_seeds(model):
    trial = fidelity.Evaluation(model, byte_tokenizer(), TEXT, SMALL)
    config = resolve("b3").with_window(SMALL.recent)
    row = trial.row(config, lambda count: None)
    seeds = [one["kl_of_chunks"] for one in trial.rows_by_seed(config, lambda count: None)]
    assert len(seeds) == SMALL.seeds > 1
    assert row["kl_of_chunks"] == pytest.approx([statistics.mean(of) for of in zip(*seeds, strict=True)])
    assert row["kl_se"] == pytest.approx(statistics.stdev(row["kl_of_chunks"]) / math.sqrt(SMALL.chunks))


def test_retrieval_is_left_out_if_not_asked_for(model):
    protocol = dataclasses.replace(SMALL, retrieval=False)
    (row,) = fidelity.measure_fidelity(model, byte_tokenizer(), ["b3"], TEXT, protocol)
    assert (row["retrieval"], row["retrieval_full"]) == (None, None)


def test_full_precision_retrieves_what_the_model_retrieves(model):
    (row,) = fidelity.measure_fidelity(model, byte_tokenizer(), ["full"], TEXT, SMALL)
    assert row["kl"] < 1e-6
    assert row["retrieval"] == row["retrieval_full"]


# The frontier


def refuse(name, error):
    raise error


def test_presets_within_a_range_come_smallest_first(model):
    found = within(model.config, ["b4", "full", "b2", "b3", "qjl-1"], (1.9, 5), refuse)
    assert [preset.name for preset in found] == ["b2", "b3", "b4"]


def test_a_preset_that_a_model_cannot_have_is_told_and_left_out(model):
    refused = {}
    wide = CacheConfig(QJL(2, outliers=40), TokenUniform(2), name="wide")  # head_dim is 32
    found = within(model.config, [wide, "b3"], (1, 8), refused.__setitem__)
    assert [preset.name for preset in found] == ["b3"]
    assert list(refused) == ["wide"]


def test_a_range_without_presets_is_refused(model, refuses):
    with refuses("no preset has 9 to 10 true bits on this model: widen --bits"):
        within(model.config, PRESETS, (9, 10), refuse)


@pytest.mark.parametrize("text", ["", "3", "8..1", "1...8", "-1..3", "a..b", "1..nan", "1..2..3"])
def test_a_range_of_bits_is_two_numbers(text, refuses):
    with refuses(f"bits {text!r} is no range"):
        parse_bits(text)


def test_a_range_may_be_a_single_size():
    assert parse_bits("2.5..2.5") == (2.5, 2.5)


def test_a_row_serves_only_what_was_measured_just_so(model):
    frontier = Frontier("tiny", model, byte_tokenizer(), TEXT, SMALL)
    (row,) = frontier.measure([PLAIN], lambda count: None)
    assert frontier.known(PLAIN, [row]) == row
    assert frontier.known(dataclasses.replace(PLAIN, summary="other words"), [row]) == row
    assert frontier.known(dataclasses.replace(PLAIN, sinks=0), [row]) is None
    for other in ({"name": "other"}, {"text": TEXT + "more"}, {"protocol": dataclasses.replace(SMALL, seeds=3)}):
        assert dataclasses.replace(frontier, **other).known(PLAIN, [row]) is None


def test_a_row_of_other_weights_does_not_serve(model):
    frontier = Frontier("tiny", model, byte_tokenizer(), TEXT, SMALL)
    row = frontier.identity(PLAIN)
    assert frontier.known(PLAIN, [row]) == row
    other = tiny(vocab_size=len(byte_tokenizer()), max_position_embeddings=CONTEXT)
    assert dataclasses.replace(frontier, model=other).known(PLAIN, [row]) == row
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert dataclasses.replace(frontier, model=other).known(PLAIN, [row]) is None


@pytest.mark.parametrize("package", machine.MODEL_PACKAGES)
def test_a_row_of_another_version_does_not_serve(package, model):
    frontier = Frontier("tiny", model, byte_tokenizer(), TEXT, SMALL)
    row = frontier.identity(PLAIN) | {"versions": machine.versions()}
    assert frontier.known(PLAIN, [row]) == row
    assert frontier.known(PLAIN, [row | {"versions": row["versions"] | {package: "0.0.1"}}]) is None


def test_kept_rows_stand_between_measured_ones(model):
    frontier = Frontier("tiny", model, byte_tokenizer(), TEXT, SMALL)
    rows = list(frontier.measure([PLAIN, PRESETS["b3"]], lambda count: None))
    kept, advanced = rows[1] | {"note": "kept"}, []
    again = list(frontier.measure([PLAIN, PRESETS["b3"]], advanced.append, [kept]))
    assert again == [rows[0], kept]
    assert sum(advanced) == 2 * SMALL.tokens


def test_every_method_at_every_width():
    found = {config.name: config for config in every_width()}
    assert len(found) == len(every_width())
    for name, config in found.items():
        if name in PRESETS:
            assert config == PRESETS[name]
    assert {name for name in found if name.startswith("b-") and "pre" not in name} == {
        f"b-{width:g}" for width in WIDTHS
    }
    assert found["quarot-2.5"].bits(64) == (3.5, 2.5)
    assert found["b-8"].bits(64) == (8.125, 8.125)
    assert not found.keys() & {"kivi-2.5", "turboquant-5"}
