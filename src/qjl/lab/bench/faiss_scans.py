"""FAISS's scans of packed codes, where the package ``faiss-cpu`` is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from qjl.lab.bench.synthetic import Shape
from qjl.lab.bench.timing import Work

PQ, RABITQ = "faiss_pq", "faiss_rabitq"
TOP = 10
TRAINED = 4096  # vectors


def is_installed() -> bool:
    return find_spec("faiss") is not None


def works(name: str, m: int, tokens: int, shape: Shape, copies: int) -> list[Work]:
    """The best ten of all tokens for each query of every KV head, with m bits per token; none where FAISS cannot."""
    make = {PQ: _pq, RABITQ: _rabitq}[name]
    if not is_installed() or (name == PQ and shape.head_dim % (m // 4)):
        return []
    dim = m if name == RABITQ else shape.head_dim
    generator = np.random.default_rng(0)
    index = make(dim, m)
    index.train(generator.standard_normal((TRAINED, dim), dtype=np.float32))
    index.add(generator.standard_normal((tokens, dim), dtype=np.float32))
    queries = generator.standard_normal((shape.group, dim), dtype=np.float32)
    return [_work(_clones(index, shape.kv_heads), queries) for _ in range(copies)]


def use_threads(count: int) -> None:
    import faiss

    faiss.omp_set_num_threads(count)


def _pq(dim: int, m: int) -> Any:
    import faiss

    return faiss.IndexPQFastScan(dim, m // 4, 4, faiss.METRIC_INNER_PRODUCT)


def _rabitq(dim: int, m: int) -> Any:
    import faiss

    return faiss.IndexRaBitQFastScan(dim, faiss.METRIC_INNER_PRODUCT)


def _clones(index: Any, count: int) -> list[Any]:
    import faiss

    content = faiss.serialize_index(index)
    return [faiss.deserialize_index(content) for _ in range(count)]


def _work(heads: list[Any], queries: np.ndarray) -> Callable[[], object]:
    return lambda: [index.search(queries, TOP) for index in heads]
