"""A layer of the vLLM plugin, on every backend, against attention over what its tokens decode to."""

import ast
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import oracles
from budget import assert_within_budget, trades
from conftest import Model
from one_layer import taken
from qjl.attention import Scoring, causal_mask
from qjl.cache.paged import Fitted, PagedCache
from qjl.codecs import Codecs, TokenShape
from qjl.methods.balanced import Balanced
from qjl.ops.triton import runtime
from qjl.packed import Field
from qjl.presets import CacheConfig
from qjl.vllm import paged_layer
from qjl.vllm.block_planner import PoolShape
from qjl.vllm.paged_layer import PagedLayer, page_bytes
from qjl.vllm.steps import Steps

HEADS, GROUP, HEAD_DIM = 2, 2, 64
PAGES = 40
SINKS, RECENT = 4, 32
MOST_QUERIES = 8
SEQUENCES = 6
CPU = torch.device("cpu")
SCORING = Scoring(0.125)
FACTORIES = {f"torch.{name}" for name in ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")}
every_page = pytest.mark.parametrize("page_tokens", [] if runtime.is_interpreted() else [16, 32, 64])  # minutes

pytestmark = pytest.mark.usefixtures("backend")


def step_of(work):
    """Totals, starts in the batch, and the table of pages, of ``(sequence, fresh tokens)``."""
    table = np.zeros((len(work), PAGES), np.int32)
    for row, (one, _) in enumerate(work):
        table[row, : len(one.pages)] = one.pages
    totals = np.array([one.context + fresh for one, fresh in work], np.int64)
    return totals, np.cumsum([0, *(fresh for _, fresh in work)]), torch.from_numpy(table)


@cache  # fitting takes longer than testing
def _codecs(sinks):
    model = Model(HEADS, HEAD_DIM, GROUP)
    config = CacheConfig(Balanced(3), Balanced(2, metric=False), sinks, RECENT)
    return Codecs(config, {0: model.rope}, lambda layer: model.statistics())


class Server:
    """One layer, the pages and the plans of some sequences."""

    def __init__(self, page_tokens, dtype=torch.float32, sinks=SINKS, device=CPU):
        model, codecs = Model(HEADS, HEAD_DIM, GROUP), _codecs(sinks)
        pool, shape = PoolShape(page_tokens, sinks, 12, 4), TokenShape(HEADS, HEAD_DIM, HEAD_DIM, device, dtype)
        self.layer = PagedLayer(codecs.of(0, shape), pool, shape)
        self.steps = Steps(pool, RECENT, MOST_QUERIES, SEQUENCES, device)
        token_bytes = self.layer.token_bytes // HEADS
        self.layer.bind(torch.zeros(PAGES, HEADS, page_tokens, token_bytes, dtype=torch.uint8, device=device))
        self.model, self.page_tokens, self.dtype, self.device = model, page_tokens, dtype, device
        self.free = list(reversed(range(PAGES)))

    def sequence(self, length):
        made = self.model.first_tokens(length)
        by_token = [x[0].transpose(0, 1).to(self.dtype) for x in (made.keys, made.values, made.queries)]
        keys, values, queries = by_token
        return SimpleNamespace(keys=keys, values=values, queries=queries, pages=[], context=0)

    def step(self, *work):
        """Give ``(sequence, fresh tokens)`` and get the outputs, and what should have been read, of each."""
        for one, fresh in work:
            while len(one.pages) * self.page_tokens < one.context + fresh:
                one.pages.append(self.free.pop())
        step, plan = self._next(work)
        keys, values, queries = (
            torch.cat([getattr(one, name)[one.context : one.context + fresh] for one, fresh in work])
            for name in ("keys", "values", "queries")
        )
        self.alone = step.alone
        out = torch.full_like(queries, torch.nan)
        self.layer.attend(step, queries, keys, values, SCORING, out)
        answers = []
        for row, ((one, fresh), part) in enumerate(zip(work, out.split([n for _, n in work]), strict=True)):
            reading = SimpleNamespace(
                skip=int(plan.skip[row]), packed=int(plan.packed[row]), pool=self._read_as_codes(fresh)
            )
            answers.append((part.transpose(0, 1)[None], self._expected(one, fresh, reading), reading))
            one.context += fresh
        return answers

    def _read_as_codes(self, fresh):
        """The pool of a step over few tokens; chunks of prompts read decoded ones."""
        return self.layer.pages.operand if fresh <= MOST_QUERIES else None

    def _next(self, work):
        plans = []
        plan_of = self.steps.planner.plan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.steps.planner, "plan", lambda requests: plans.append(plan_of(requests)) or plans[0])
            step = self.steps.next(*step_of(work))
        return step, plans[0]

    def _expected(self, one, fresh, reading):
        """Over tokens as they are, but for those that are read packed: decoded from a fresh encoding."""
        total = one.context + fresh
        keys, values = (
            self._decoded(codec, x[:total], reading.skip, reading.packed)
            for codec, x in zip(self.layer.codecs, (one.keys, one.values), strict=True)
        )
        query = one.queries[one.context : total].transpose(0, 1)[None]
        mask = causal_mask(fresh, total, torch.device("cpu"))
        arrays = (x.double().numpy() for x in (query, keys, values))
        return torch.from_numpy(oracles.Attention.out(*arrays, SCORING.scaling, mask.numpy()))

    def _decoded(self, codec, x, begin, end):
        exact = x.float().transpose(0, 1)[None]
        padded = torch.nn.functional.pad(exact, (0, 0, 0, -len(x) % 64))
        first = torch.arange(0, padded.shape[2], 64)[None]
        decoded = codec.dequantize(codec.encode_tokens(padded.to(self.dtype), first), first)
        return torch.cat([exact[:, :, :begin], decoded[:, :, begin:end], exact[:, :, end:]], dim=2)


def _check(answers, atol=2e-4):
    for out, expected, reading in answers:
        if reading.pool is not None and out.dtype == torch.float32 and trades():
            assert_within_budget(out.double(), expected, reading.pool)
        else:
            torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)


@every_page
def test_prompts_chunks_and_single_tokens_of_several_sequences(page_tokens):
    server = Server(page_tokens)
    first, second, third = (server.sequence(length) for length in (230, 150, 60))
    _check(server.step((first, 100)))
    _check(server.step((first, 90), (second, 130)))  # a chunk beside a whole prompt
    packed = 0
    for _ in range(5):
        answers = server.step((first, 1), (second, 1))
        _check(answers)
        packed = max(packed, *(reading.packed - reading.skip for _, _, reading in answers))
    assert packed > 80
    _check(server.step((first, 1), (third, 50), (second, 1)))


@every_page
def test_what_was_before_a_chunk_for_kernels_of_others(page_tokens, monkeypatch):
    monkeypatch.setattr(paged_layer, "TILE_BLOCKS", 2)
    server = Server(page_tokens)
    one = server.sequence(400)
    server.step((one, 340))
    [(_, _, reading)] = server.step((one, 50))
    assert reading.packed > reading.skip > 0
    [alone] = server.alone
    parts = list(server.layer.before(alone))
    for index, (codec, exact) in enumerate(zip(server.layer.codecs, (one.keys, one.values), strict=True)):
        expected = server._decoded(codec, exact[:340], reading.skip, reading.packed)[0].transpose(0, 1)
        torch.testing.assert_close(torch.cat([part[index] for part in parts]).float(), expected, atol=1e-5, rtol=0)


@every_page
def test_some_tokens_at_once_as_in_speculative_decoding_and_back(page_tokens):
    """Drafts of other lengths in one step; those that are not accepted are written again."""
    server = Server(page_tokens)
    first, second = server.sequence(200), server.sequence(200)
    server.step((first, 120), (second, 127))
    for drafts in ((4, 4), (1, 5), (3, 2), (8, 1), (5, 6)):
        _check(server.step((first, drafts[0]), (second, drafts[1])))
        first.context -= (drafts[0] - 1) // 2  # some are rejected
        second.context -= drafts[1] - 1


@every_page
@pytest.mark.parametrize("fresh", [1, 3])
def test_a_page_that_another_sequence_fills_in_the_same_step(page_tokens, fresh):
    """Both attend together, and the one that only begins reads what the other writes."""
    server = Server(page_tokens)
    first, second = server.sequence(140), server.sequence(140)
    server.step((first, 128 - fresh))
    second.context, second.pages = 128, first.pages[: 128 // page_tokens]
    for name in ("keys", "values"):
        getattr(second, name)[:128] = getattr(first, name)[:128]
    _check(server.step((second, fresh), (first, fresh)))
    _check(server.step((first, 1), (second, 1)))


def test_a_prompt_and_its_first_answers():
    server = Server(32)
    one = server.sequence(103)
    _check(server.step((one, 100)))
    answers = server.step((one, 3))
    assert answers[0][2].packed == 64
    _check(answers)


def test_more_sequences_than_there_is_room_for_are_refused(refuses):
    server = Server(64)
    with refuses(f"a step of {SEQUENCES + 1} sequences, where there is room for {SEQUENCES}."):
        server.step(*((server.sequence(3), 1) for _ in range(SEQUENCES + 1)))


def test_a_pool_in_half_precision():
    server = Server(64, torch.bfloat16)
    one = server.sequence(110)
    server.step((one, 100))
    _check(server.step((one, 1)), atol=3e-2)


@contextmanager
def half_precision():
    """As vLLM sets it while it loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def no_device():
    """What asks for no device gets no memory."""
    return torch.device("meta")


def tensors_in(x):
    if torch.is_tensor(x):
        yield x
    elif isinstance(x, list | tuple):
        yield from (inner for one in x for inner in tensors_in(one))
    elif is_dataclass(x):
        yield from tensors_in([getattr(x, one.name) for one in fields(x)])


@pytest.mark.parametrize("mode", [half_precision, no_device])
def test_torch_s_defaults_do_not_reach_into_plans_and_pools(mode):
    """A prompt's chunk, drafts of several tokens and of one, beside each other."""
    pool = PoolShape(32, SINKS, 12, 4)
    contexts = ((0, 150), (130, 90), (130, 3), (60, 3), (100, 1))
    work = [
        (SimpleNamespace(pages=list(range(7 * row, 7 * row + 7)), context=context), fresh)
        for row, (context, fresh) in enumerate(contexts)
    ]
    before = [
        (SimpleNamespace(pages=one.pages, context=0), one.context) if one.context else (one, 0) for one, _ in work
    ]
    codecs = Server(32).layer.codecs

    def made():
        steps = Steps(pool, RECENT, MOST_QUERIES, SEQUENCES, CPU)
        steps.next(*step_of(before))
        step = steps.next(*step_of(work))
        layer = PagedLayer(codecs, pool, TokenShape(HEADS, HEAD_DIM, HEAD_DIM, CPU, torch.float16))
        return [*tensors_in(step), layer.exact.keys, layer.exact.values]

    usual = made()
    with mode():
        ours = made()
    assert len(usual) > 25
    for one, other in zip(ours, usual, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)


@pytest.mark.parametrize("path", sorted(Path(paged_layer.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_the_plugin_makes_no_tensor_of_torch_s_default_kind(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) in FACTORIES]
    for call in made:
        assert {one.arg for one in call.keywords} >= {"dtype", "device"}, ast.unparse(call)
    assert made or path.stem != "steps"


def test_codes_without_a_value_per_token_do_not_fit_pages(refuses):
    with refuses("zeros is not kept per token: such codes do not fit pages."):
        page_bytes([{"codes": Field((8, 64), torch.uint8), "zeros": Field((8,), torch.float16)}])


def test_pages_are_the_codes_and_nothing_else():
    layer = Server(64).layer
    key, value = Balanced(3).bits(HEAD_DIM), Balanced(2, metric=False).bits(HEAD_DIM)
    assert layer.token_bytes == HEADS * HEAD_DIM * (key + value) / 8


@pytest.mark.skipif(runtime.is_interpreted(), reason="minutes")
@pytest.mark.parametrize(
    ("page_tokens", "sinks", "chunks"),
    [(64, 0, [230]), (16, 4, [100, 90, *[1] * 40]), (32, 16, [64, 3, 8, 5, 150]), (64, 16, [64, 3, 8, 5, 150])],
)
def test_pages_hold_the_bytes_of_a_cache_in_transformers(page_tokens, sinks, chunks):
    """However the prompt came, and of whatever size the pages are."""
    tokens = Model(HEADS, HEAD_DIM, GROUP).first_tokens(sum(chunks))
    cache = PagedCache([0], sinks, RECENT, Fitted(_codecs(sinks)))
    cache.append(cache.layers[0], tokens.keys, tokens.values)
    cache.settle()
    expected = taken(cache.layers[0].pages, cache.index.table[0, : cache.index.blocks[0]])

    server = Server(page_tokens, sinks=sinks)
    one = server.sequence(sum(chunks))
    one.keys, one.values = (x[0].transpose(0, 1) for x in (tokens.keys, tokens.values))
    for fresh in chunks:
        server.step((one, fresh))
    whole = sum(chunks) // 64 * 64 // page_tokens
    assert whole * page_tokens // 64 >= len(expected[0]["codes"]) > 1
    for of_engine, of_cache in zip(server.layer.pages.fields, expected, strict=True):
        for name, blocks in of_cache.items():
            found = torch.cat(list(of_engine[name][one.pages[:whole]]), -1).unflatten(-1, (-1, 64)).movedim(-2, 0)
            assert found[: len(blocks)].equal(blocks), name
