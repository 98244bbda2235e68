"""What the host knows of the tables that vLLM's runners keep on a device: the same pages, whatever is given to whom."""

import ast
import logging
import random
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from qjl.vllm import compat
from qjl.vllm.compat import CHECKED, TABLES
from qjl.vllm.host_tables import known_pages
from released import Release

REQUESTS, MOST = 6, 8


class BlockTable:
    """Of the first runner: rows in the order of the batch, copied to the device before each step."""

    def __init__(self):
        self.here, self.there = np.zeros((REQUESTS, MOST), np.int32), torch.zeros(REQUESTS, MOST, dtype=torch.int32)

    def get_device_tensor(self, num_reqs):
        return self.there[:num_reqs]

    def get_numpy_array(self):
        return self.here


class BlockTables:
    """Of the second runner: rows by request, on the device alone, and gathered for each batch."""

    redirect_writes_to_null_block = False

    def __init__(self, groups=1):
        self.of_requests = [torch.zeros(REQUESTS, MOST, dtype=torch.int32) for _ in range(groups)]
        self.input_block_tables = [torch.zeros_like(table) for table in self.of_requests]
        self.counts = np.zeros((groups, REQUESTS), int)

    def append_block_ids(self, req_index, new_block_ids, overwrite):
        for group, pages in enumerate(new_block_ids):
            start = 0 if overwrite else self.counts[group, req_index]
            stop = self.counts[group, req_index] = start + len(pages)
            written = torch.tensor(pages, dtype=torch.int32)
            self.of_requests[group][req_index, start:stop] = 0 if self.redirect_writes_to_null_block else written

    def gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None):
        for source, gathered in zip(self.of_requests, self.input_block_tables, strict=True):
            gathered[: len(idx_mapping)] = source[idx_mapping]
        return tuple(table[:num_reqs_padded] for table in self.input_block_tables)

    def get_dummy_block_tables(self, num_reqs):
        return tuple(table[:num_reqs].zero_() for table in self.input_block_tables)


class AttentionGroup:
    kernel_block_size, kernel_block_stride = None, 0
    kv_cache_spec = SimpleNamespace(block_size=128)

    def map_to_kernel_block_table(self, block_table, ubatch_idx=0):
        if self.kernel_block_size is None:
            return block_table
        parts = self.kv_cache_spec.block_size // self.kernel_block_size
        return (block_table[:, :, None] * (self.kernel_block_stride or parts) + torch.arange(parts)).flatten(1)


@pytest.fixture
def runners(monkeypatch):
    """A vLLM whose runners are followed: classes of their own in every test."""
    classes = [type(one.__name__, (one,), dict(vars(one))) for one in (BlockTable, BlockTables, AttentionGroup)]
    names = [name for home, [name] in TABLES.names.items()]
    assert [one.__name__ for one in classes] == names
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    for home, one in zip(TABLES.names, classes, strict=True):
        for depth in range(1, home.count(".") + 1):
            package = ".".join(home.split(".")[: depth + 1])
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        setattr(sys.modules[home], one.__name__, one)
    monkeypatch.setitem(TABLES.members, "AttentionGroup", ("kernel_block_size", "map_to_kernel_block_table"))
    compat.follow_tables()
    return SimpleNamespace(first=classes[0], second=classes[1], group=classes[2])


@pytest.mark.parametrize("version", CHECKED)
def test_the_pretended_runner_writes_what_a_release_writes(version):
    release = Release(version)
    if not release.path.exists():
        pytest.skip(f"NOT TESTED: the sources of vLLM {version} are not here: make vllm-sources")
    theirs = release.members("vllm.v1.worker.gpu.block_table", "BlockTables")["append_block_ids"]
    found, chance = {}, random.Random(0)
    exec(compile(ast.unparse(theirs), "append_block_ids", "exec"), found)
    tables, released = BlockTables(groups=2), ReleasedTables(groups=2)
    for _ in range(50):
        request, is_new, is_null = chance.randrange(REQUESTS), chance.random() < 0.3, chance.random() < 0.1
        count = chance.randint(0, MOST - (0 if is_new else tables.counts[:, request].max()))
        given = tuple([chance.randint(1, 99) for _ in range(count)] for _ in range(2))
        tables.redirect_writes_to_null_block = released.redirect_writes_to_null_block = is_null
        tables.append_block_ids(request, given, overwrite=is_new)
        found["append_block_ids"](released, request, given, overwrite=is_new)
        assert all(map(np.array_equal, tables.of_requests, released.written))


class ReleasedTables:
    """What a release's ``append_block_ids`` finds in its class."""

    def __init__(self, groups):
        self.num_kv_cache_groups = groups
        self.num_blocks = SimpleNamespace(np=np.zeros((groups, REQUESTS), int))
        self.written = [np.zeros((REQUESTS, MOST), int) for _ in range(groups)]
        self.block_tables = [SimpleNamespace(gpu=x, stage_write=partial(self.stage, x)) for x in self.written]

    @staticmethod
    def stage(written, request, start, pages):
        written[request, start : start + len(pages)] = pages


def read(table, requests=None):
    """A whole table, as the host knows it."""
    pages = known_pages(table, len(table), requests)
    return None if pages is None else pages(*np.indices(table.shape))


def test_the_first_runner_s_table_is_its_own_copy(runners):
    table = runners.first()
    table.here[:] = np.arange(REQUESTS * MOST).reshape(REQUESTS, MOST)
    table.there.copy_(torch.from_numpy(table.here))
    found = table.get_device_tensor(4)
    assert np.array_equal(read(found), found.numpy())


@pytest.mark.parametrize("seed", range(5))
def test_the_second_runner_s_tables_are_followed(seed, runners):
    """Requests come, grow, go, and others take their places; a batch has some of them, in any order."""
    chance = random.Random(seed)
    tables, other = runners.second(groups=2), runners.second()
    for _ in range(60):
        request, is_new = chance.randrange(REQUESTS), chance.random() < 0.3
        count = chance.randint(0, MOST - (0 if is_new else tables.counts[:, request].max()))
        tables.redirect_writes_to_null_block = chance.random() < 0.1
        new = tuple([chance.randint(1, 99) for _ in range(count)] for _ in range(2))
        tables.append_block_ids(request, new, overwrite=is_new)
        other.append_block_ids(chance.randrange(REQUESTS), ([chance.randint(1, 99)],), overwrite=True)
        chosen = np.array(chance.sample(range(REQUESTS), 3))
        for group, table in enumerate(tables.gather_block_tables(torch.from_numpy(chosen), num_reqs_padded=3)):
            for row, given in enumerate(tables.counts[group, chosen]):
                assert np.array_equal(read(table, chosen)[row, :given], table[row, :given].numpy())


def test_tables_that_nobody_gathered_are_not_known(runners):
    tables = runners.second()
    tables.append_block_ids(0, ([5],), overwrite=True)
    [gathered] = tables.gather_block_tables(torch.tensor([0]), 1)
    assert read(gathered, np.array([0]))[0, 0] == 5
    [dummy] = tables.get_dummy_block_tables(1)
    assert read(dummy, np.array([0])) is None
    assert read(gathered[:1], np.array([0])) is None
    assert read(gathered) is None, "without requests"
    [padded] = tables.gather_block_tables(torch.tensor([0]), 2)
    assert read(padded, np.array([0])) is None, "more rows than requests"


@pytest.mark.parametrize(("size", "stride"), [(64, 0), (32, 0), (32, 20)])
def test_pages_that_are_cut_for_a_backend(size, stride, runners):
    tables, group = runners.second(), runners.group()
    tables.append_block_ids(2, ([7, 3, 9],), overwrite=True)
    group.kernel_block_size, group.kernel_block_stride = size, stride
    [whole] = tables.gather_block_tables(torch.tensor([2]), 1)
    cut = group.map_to_kernel_block_table(whole)
    assert np.array_equal(read(cut, np.array([2])), cut.numpy())
    assert read(group.map_to_kernel_block_table(whole.clone()), np.array([2])) is None


def test_methods_are_followed_once(runners):
    before = runners.second.append_block_ids
    compat.follow_tables()
    assert runners.second.append_block_ids is before


def test_a_step_s_batch_has_what_the_host_knows(runners):
    tables = runners.second()
    tables.append_block_ids(3, ([4, 6],), overwrite=True)
    [table] = tables.gather_block_tables(torch.tensor([3]), 1)
    common = SimpleNamespace(
        causal=True,
        num_reqs=1,
        seq_lens_cpu_upper_bound=torch.tensor([70]),
        query_start_loc_cpu=torch.tensor([0, 1]),
        block_table_tensor=table,
        req_idx=np.array([3]),
    )
    batch = compat.batch(common)
    assert batch.pages(np.array([0, 0]), np.array([0, 1])).tolist() == [4, 6]


def test_a_runner_that_is_another_is_told_of_and_let_be(runners, monkeypatch, caplog):
    monkeypatch.setattr(runners.second, "append_block_ids", lambda self, request, pages: None)
    with caplog.at_level(logging.WARNING):
        compat.follow_tables()
    assert "lacks BlockTables.append_block_ids as it was" in caplog.text
    caplog.clear()
    monkeypatch.delattr(runners.first, "get_numpy_array")
    monkeypatch.delattr(BlockTable, "get_numpy_array")
    with caplog.at_level(logging.WARNING):
        compat.follow_tables()
    assert "lacks BlockTable.get_numpy_array" in caplog.text
