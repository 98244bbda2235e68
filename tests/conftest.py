"""What the test rooms share: poisoned memory, keys as models make them, and what an error message must be."""

import gc
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy comes

import pytest
import torch
from hypothesis import HealthCheck, settings

from qjl import ops
from qjl.errors import QJLError
from qjl.methods.base import LayerContext
from qjl.ops.cpu import library
from qjl.ops.triton import runtime
from qjl.packed import BLOCK
from qjl.rope import Rope
from qjl.statistics import AttentionMoments, layer_statistics

torch.set_num_threads(1)  # tensors are small here: threads would wait for each other
settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("thorough", settings.get_profile("default"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish():
    """What is imported stays: a collection of garbage, as of the benches, need not walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory from ``torch.empty`` holds NaN (or the largest integer), so that reading it before writing shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _kernels():
    """Backends that have kernels of their own; Triton's interpreter changes a process, and is tested in another."""
    if runtime.is_interpreted():
        return ["triton"]
    return [f"cpu-{name}" for name in library.instruction_sets()] if library.is_installed() else []


@contextmanager
def using_backend(backend):
    """With one of ``_kernels`` or the reference."""
    before = ops.active_backend()
    name, _, instructions = backend.partition("-")
    ops.use_backend(name)
    if instructions:
        fastest = library.instruction_set()
        library.use_instruction_set(instructions)
    yield backend
    if instructions:
        library.use_instruction_set(fastest)
    ops.use_backend(before)


def _usual():
    """What is in use where no test chooses another."""
    return f"cpu-{library.instruction_set()}" if library.is_installed() else "reference"


USUAL = _usual()


@pytest.fixture(params=["reference", *_kernels()])
def backend(request):
    """Every backend in turn, and every instruction set of the compiled one."""
    with using_backend(request.param) as backend:
        yield backend


@pytest.fixture(params=_kernels())
def kernels(request):
    """The same without the reference."""
    with using_backend(request.param) as backend:
        yield backend


@pytest.fixture
def cpu_kernels(kernels):
    """Those of the compiled backend alone."""
    if not kernels.startswith("cpu"):
        pytest.skip("of the cpu backend")


@pytest.fixture
def reference_backend():
    with using_backend("reference"):
        yield


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@dataclass(frozen=True, eq=False)
class Tokens:
    """One layer's tensors after RoPE: keys and values ``[B, H, T, D]``, queries ``[B, H * group, T, D]``."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    rope: Rope

    def grouped_queries(self):
        """``[B, H, group * T, D]``: all queries of a KV head."""
        return self.queries.reshape(*self.keys.shape[:2], -1, self.keys.shape[3])


class Model:
    """Makes tokens as language models do: keys and queries with a mean before RoPE and uneven directions."""

    def __init__(self, heads=2, head_dim=64, group=2, seed=0):
        self.heads, self.head_dim, self.group, self.seed = heads, head_dim, group, seed
        self._generator = torch.Generator().manual_seed(seed)
        self.rope = Rope(10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
        self._key_root, self._query_root = self._root(heads), self._root(heads * group)
        self._key_mean = 3 * self._normal(heads, 1, head_dim)
        self._query_mean = self._normal(heads * group, 1, head_dim)
        self._value_mean = 0.5 * self._normal(heads, 1, head_dim)

    def tokens(self, positions):
        """Fresh tokens at ``positions [B, T]``."""
        batch, length = positions.shape
        keys = self._normal(batch, self.heads, length, self.head_dim) @ self._key_root + self._key_mean
        queries = self._normal(batch, self.heads * self.group, length, self.head_dim) @ self._query_root
        values = self._normal(batch, self.heads, length, self.head_dim) + self._value_mean
        rotate = self.rope.rotate
        return Tokens(rotate(keys, positions), values, rotate(queries + self._query_mean, positions), self.rope)

    def first_tokens(self, length, batch=1):
        return self.tokens(torch.arange(length).expand(batch, -1))

    def statistics(self):
        """Of 600 tokens of its own."""
        return _statistics(self.heads, self.head_dim, self.group, self.seed)

    def _normal(self, *shape):
        return torch.randn(*shape, generator=self._generator)

    def _root(self, count):
        directions = torch.linalg.qr(self._normal(count, self.head_dim, self.head_dim)).Q
        return (1 + torch.arange(self.head_dim))[None, :, None] ** -0.5 * 2 * directions


@cache
def _statistics(heads, head_dim, group, seed):
    model = Model(heads, head_dim, group, seed)
    tokens, positions = model.first_tokens(600), torch.arange(600)[None]
    valid = torch.ones(1, 600, dtype=torch.bool)
    attention = AttentionMoments()
    scores = tokens.queries @ tokens.keys.repeat_interleave(group, 1).transpose(2, 3)
    out = scores.mul(head_dim**-0.5).softmax(-1) @ tokens.values.repeat_interleave(group, 1)
    attention.add(tokens.queries, out, positions, valid, model.rope, heads)
    return layer_statistics(tokens.keys, tokens.values, positions, valid, attention, model.rope)


@pytest.fixture(scope="session")
def model_of():
    """``model_of(heads, head_dim, group)``: a maker of tokens, the same at each call."""
    return Model


@pytest.fixture(scope="session")
def fitted(model_of):
    """A codec, two rows of two blocks of tokens at different positions, their codes, and queries."""

    @cache  # all of them: fitting takes longer than testing
    @using_backend(USUAL)  # whichever test asks first
    def case(role, quantizer, head_dim):
        model = model_of(head_dim=head_dim)
        statistics = model.statistics()
        context = LayerContext(role, 2, head_dim, torch.device("cpu"), torch.float32, statistics, model.rope)
        learned = quantizer.learn(context)
        codec = quantizer.build(context, learned)
        first = torch.tensor([[4, 68], [1040, 1104]])
        positions = (first[..., None] + torch.arange(BLOCK)).flatten(1)
        tokens = model.tokens(positions)
        x = tokens.keys if role == "key" else tokens.values
        return SimpleNamespace(
            context=context,
            learned=learned,
            codec=codec,
            statistics=statistics,
            x=x,
            query=tokens.grouped_queries()[:, :, ::6].contiguous(),
            first=first,
            positions=positions,
            blocks=codec.quantize(x, first),
            rope=model.rope,
        )

    return case


@pytest.fixture(scope="session")
def run_through():
    """Put tokens through a layer (``OneLayer``) in passes of the given sizes, as an engine would."""

    def run(layer, tokens: Tokens, sizes, padding=None):
        if padding is not None:
            layer.cache.set_padding(padding, padding_origins(padding))
        start = 0
        for size in sizes:
            layer.step(tokens, slice(start, start + size))
            start += size
        return layer

    def padding_origins(padding):
        return [0] * len(padding)

    return run


@pytest.fixture(scope="session")
def refuses():
    """``with refuses("text"):`` expects a QJLError that says so, in one line and one sentence."""

    @contextmanager
    def expect(match):
        with pytest.raises(QJLError, match=re.escape(match)) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        assert message.endswith(".")
        assert not re.search(r"[.!?] +[A-Z]", message)

    return expect
