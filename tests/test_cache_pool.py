"""Pages and exact slots of one layer: what is written stays, whatever else is."""

import pytest
import torch

from one_layer import taken
from qjl.cache.pool import ExactTokens, Pages, run_of
from qjl.codecs import TokenShape
from qjl.packed import BLOCK, Field, block_bits, blocks_of_tokens

LAYOUT = {
    "codes": Field((3, BLOCK), torch.uint8),
    "scale": Field((BLOCK,), torch.float16),
    "index": Field((5,), torch.int16),
}
CPU = torch.device("cpu")


class _Codec:
    layout, form = LAYOUT, None


def _pages(capacity=8, heads=3):
    return Pages((_Codec(), _Codec()), heads, capacity, CPU)


def _blocks(count, heads=3, generator=None):
    """Blocks of random content, none of it zero."""
    return {
        name: torch.randint(1, 100, (1, heads, count, *field.shape), generator=generator).to(field.dtype)
        for name, field in LAYOUT.items()
    }


def _write(pages, blocks, numbers):
    """To the keys' fields, as ops do."""
    for name, field in pages.fields[0].items():
        field[numbers] = blocks[name][0].transpose(0, 1)


def _require(pages, numbers, blocks):
    for name, tensor in taken(pages, numbers)[0].items():
        assert tensor.dtype == LAYOUT[name].dtype
        assert torch.equal(tensor, blocks[name][0].transpose(0, 1))


def test_memory_is_poisoned():
    """Of the tests themselves: what is read before it is written must show."""
    assert torch.empty(5).isnan().all()
    assert torch.zeros(1).new_empty(5, dtype=torch.bfloat16).isnan().all()


def test_growth_keeps_the_content(generator):
    pages, blocks = _pages(2), _blocks(2, generator=generator)
    _write(pages, blocks, [1, 0])
    for capacity in (2, 1, 7, 100):
        pages.reserve(capacity)
    assert pages.capacity == 100
    _require(pages, [1, 0], blocks)


def test_fields_are_no_copy(generator):
    pages = _pages()
    pages.fields[0]["scale"][2] = 7
    assert (taken(pages, [2])[0]["scale"] == 7).all()
    assert pages.fields[0]["codes"].shape == (8, 3, 3, BLOCK)


def test_a_page_is_copied(generator):
    pages, blocks = _pages(), _blocks(2, generator=generator)
    _write(pages, blocks, [0, 1])
    pages.copy([(1, 5), (0, 6)])
    _require(pages, [6, 5], blocks)
    _write(pages, _blocks(2, generator=generator), [5, 6])
    _require(pages, [0, 1], blocks)


@pytest.mark.parametrize("kept", [1, 36, 63])
def test_filling_a_page_leaves_its_first_tokens(kept, generator):
    pages = _pages()
    tokens = {name: field for name, field in LAYOUT.items() if field.shape[-1] == BLOCK}
    pages.storage = [{name: x for name, x in side.items() if name in tokens} for side in pages.storage]
    before, after = _blocks(1, generator=generator), _blocks(1, generator=generator)
    _write(pages, before, [3])
    pages.fill(0, after, [3], [kept])
    for name, found in taken(pages, [3])[0].items():
        assert torch.equal(found[0, ..., :kept], before[name][0, :, 0, ..., :kept])
        assert torch.equal(found[0, ..., kept:], after[name][0, :, 0, ..., kept:])


def test_bytes_are_those_of_the_layout():
    pages = _pages(capacity=8, heads=3)
    assert 8 * pages.page_bytes == 2 * 3 * block_bits(LAYOUT)
    assert pages.nbytes == 8 * pages.page_bytes
    assert block_bits(LAYOUT) == 8 * (3 * 64 + 2 * 64 + 2 * 5)


def test_exact_tokens_keep_their_slots(generator):
    shape = TokenShape(2, 8, 16, CPU, torch.bfloat16)
    exact = ExactTokens(shape, 4)
    keys, values = torch.randn(3, 2, 8, generator=generator), torch.randn(3, 2, 16, generator=generator)
    exact.put(torch.tensor([3, 0, 2]), keys, values)
    exact.reserve(50)
    assert (exact.capacity, exact.token_bytes, exact.nbytes) == (50, 2 * 24 * 2, 50 * 2 * 24 * 2)
    found = exact.read(torch.tensor([[3, 0], [2, 2]]))
    assert torch.equal(found[0], keys.bfloat16()[torch.tensor([[0, 1], [2, 2]])].transpose(1, 2))
    assert torch.equal(found[1], values.bfloat16()[torch.tensor([[0, 1], [2, 2]])].transpose(1, 2))
    view = exact.read(slice(2, 4))[0]
    assert view.untyped_storage().data_ptr() == exact.keys.untyped_storage().data_ptr()
    assert torch.equal(view[0, :, 1], keys.bfloat16()[0])


@pytest.mark.parametrize(
    ("numbers", "expected"), [([3], slice(3, 4)), ([2, 3, 4], slice(2, 5)), ([4, 3, 2], None), ([1, 3], None)]
)
def test_runs_are_slices(numbers, expected):
    assert run_of(numbers) == expected


def test_blocks_of_tokens_cuts_the_token_axis():
    x = torch.arange(2 * 128).view(1, 1, 128, 2)
    blocks = blocks_of_tokens(x)
    assert blocks.shape == (1, 1, 2, 64, 2)
    assert torch.equal(blocks[0, 0, 1, 3], x[0, 0, 67])
