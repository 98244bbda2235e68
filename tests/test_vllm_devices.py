"""The vLLM plugin's layers on a GPU that is pretended: the bytes of a CPU, and steps that wait for nothing."""

import pytest
import torch

from qjl.ops.triton import runtime

if not runtime.is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from pretended_gpu import GPU, OnGpu, on_gpu, on_host, pretended_gpu, watched
from qjl.vllm import steps
from qjl.vllm.host_tables import HostTable
from qjl.vllm.steps import STAGES
from test_vllm_layer import SCORING, SEQUENCES, Server, step_of, tensors_in

pytestmark = pytest.mark.skipif(
    runtime.is_interpreted() or torch.cuda.is_available(), reason="the kernels themselves are run by others"
)


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch):
        yield


def carried_out(server, work, is_told=True):
    """A step on the server's device: outputs, what was seen while it was planned and while a layer attended, the step.

    ``is_told``: the host knows the table of pages.
    """
    for one, fresh in work:
        while len(one.pages) * server.page_tokens < one.context + fresh:
            one.pages.append(server.free.pop())
    totals, starts, table = step_of(work)
    keys, values, queries = (
        torch.cat([getattr(one, name)[one.context : one.context + fresh] for one, fresh in work])
        for name in ("keys", "values", "queries")
    )
    pages = HostTable(table.numpy()).of(len(work), None) if is_told else None
    if server.device == GPU:
        table, keys, values, queries = on_gpu((_in_place(server, table), keys, values, queries))
    with watched() as planning:
        step = server.steps.next(totals, starts, table, pages)
    out = torch.full_like(queries, torch.nan)
    with watched() as attending:
        server.layer.attend(step, queries, keys, values, SCORING, out)
    for one, fresh in work:
        one.context += fresh
    return out, planning, attending, step


def _in_place(server, table):
    """Tables of all steps lie where the first one did, as an engine's do."""
    kept = vars(server).setdefault("table", torch.zeros(SEQUENCES, table.shape[1], dtype=table.dtype))
    return kept[: len(table)].copy_(table)


@pytest.mark.parametrize(("page_tokens", "room"), [(16, None), (64, None), (16, 90)])
def test_a_gpu_holds_and_gives_what_a_cpu_does(page_tokens, room, gpu, reference_backend, monkeypatch):
    """Also where ``room`` for numbers that go to the device at once is less than a step has."""
    if room:
        monkeypatch.setattr(steps, "MOST_NUMBERS", room)
    here, there = Server(page_tokens), Server(page_tokens, device=GPU)
    sequences = [[server.sequence(length) for length in (230, 150)] for server in (here, there)]
    for fresh in ((100, 60), (70, 5), *[(1, 1)] * 30, (3, 1), (1, 3)):
        (expected, *_), (found, *_) = (
            carried_out(server, list(zip(own, fresh, strict=True)))
            for server, own in zip((here, there), sequences, strict=True)
        )
        assert isinstance(found, OnGpu)
        torch.testing.assert_close(on_host(found), expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(here.layer.pages.fields, on_host(there.layer.pages.fields), strict=True):
        assert all(field.equal(theirs[name]) for name, field in ours.items())


@pytest.mark.parametrize("fresh", [1, 3])
def test_decode_steps_wait_for_nothing(fresh, gpu):
    """Pages that are filled meanwhile too."""
    server = Server(64, device=GPU)
    rows = [server.sequence(400) for _ in range(2)]
    carried_out(server, [(rows[0], 150), (rows[1], 187)])
    carried_out(server, [(one, fresh) for one in rows])  # what backends make once of a form
    for _ in range(30):
        _, planning, attending, _ = carried_out(server, [(one, fresh) for one in rows])
        assert not planning.waits
        assert planning.nbytes == 0
        assert planning.copies in ([True], [True, True])  # what rows read, and what is encoded
        assert not attending.waits
        assert attending.launches.count("prepare") == 1


def test_prompts_and_drafts_of_other_lengths_wait_for_nothing_when_they_are_planned(gpu):
    server = Server(64, device=GPU)
    first, second, third = (server.sequence(400) for _ in range(3))
    for work in (
        [(first, 150), (second, 100)],
        [(first, 3), (third, 120), (second, 3)],  # those that attend together do not follow each other
        [(first, 64), (second, 1), (third, 5)],
    ):
        assert not carried_out(server, work)[1].waits


def test_a_table_that_the_host_does_not_know_is_read_back_once_in_a_step(gpu):
    server = Server(64, device=GPU)
    row = server.sequence(200)
    carried_out(server, [(row, 100)], is_told=False)
    assert carried_out(server, [(row, 1)], is_told=False)[1].waits == ["steps.of_device: a copy to the host"]


def test_steady_decoding_makes_nothing_on_the_device(gpu):
    """Fifty steps that fill no page: one copy from pinned memory each, into what the step before read."""
    server = Server(64, device=GPU)
    rows = [server.sequence(200) for _ in range(3)]
    carried_out(server, [(rows[0], 130), (rows[1], 66), (rows[2], 5)])
    _, _, attended, first = carried_out(server, [(one, 1) for one in rows])
    before = [x.data_ptr() for x in tensors_in(first)]
    assert len(before) == 6
    for _ in range(50):
        _, planning, attending, step = carried_out(server, [(one, 1) for one in rows])
        assert planning.copies == [True]
        assert not attending.copies
        assert planning.nbytes == 0
        assert not planning.waits + attending.waits
        assert step.together[0].rows is first.together[0].rows
        assert [x.data_ptr() for x in tensors_in(step)] == before
        assert attending.grids == attended.grids


def test_sequences_that_come_and_go_read_from_the_same_buffer(gpu):
    server = Server(64, device=GPU)
    rows = [server.sequence(200) for _ in range(3)]
    carried_out(server, [(one, 70) for one in rows])
    carried_out(server, [(one, 1) for one in rows])
    for some in (rows[:2], rows, rows[1:], rows):
        planning = carried_out(server, [(one, 1) for one in some])[1]
        assert planning.copies == [True]
        assert planning.nbytes == 0


def test_memory_that_may_be_under_way_to_the_device_is_not_written(gpu):
    """The host is as many steps ahead as there are stages, and then waits."""
    server = Server(64, device=GPU)
    row = server.sequence(200)
    carried_out(server, [(row, 100)])
    with watched() as seen:
        for _ in range(STAGES + 1):
            carried_out(server, [(row, 1)])
    assert seen.waits == ["steps.push: an event"]
