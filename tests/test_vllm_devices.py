"""The vLLM plugin's layers on a GPU that is pretended: the bytes of a CPU, and decode steps that do not wait."""

import pytest
import torch

from qjl.ops.triton import runtime

if not runtime.is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from pretended_gpu import GPU, OnGpu, on_gpu, on_host, pretended_gpu, watched
from test_vllm_layer import SCORING, Server, step_of

pytestmark = pytest.mark.skipif(
    runtime.is_interpreted() or torch.cuda.is_available(), reason="the kernels themselves are run by others"
)


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch):
        yield


def carried_out(server, work):
    """A step on the device of the server: its outputs, where its plan waited, and where its layer did."""
    for one, fresh in work:
        while len(one.pages) * server.page_tokens < one.context + fresh:
            one.pages.append(server.free.pop())
    totals, starts, table = step_of(work)
    keys, values, queries = (
        torch.cat([getattr(one, name)[one.context : one.context + fresh] for one, fresh in work])
        for name in ("keys", "values", "queries")
    )
    if server.device == GPU:
        table, keys, values, queries = on_gpu((table, keys, values, queries))
    with watched() as planning:
        step = server.steps.next(totals, starts, table)
    out = torch.full_like(queries, torch.nan)
    with watched() as attending:
        server.layer.attend(step, queries, keys, values, SCORING, out)
    for one, fresh in work:
        one.context += fresh
    return out, planning, attending


@pytest.mark.parametrize("page_tokens", [16, 64])
def test_a_gpu_holds_and_gives_what_a_cpu_does(page_tokens, gpu, reference_backend):
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
def test_decode_steps_wait_for_nothing_but_the_names_of_pages(fresh, gpu):
    """Pages that are filled meanwhile too."""
    server = Server(64, device=GPU)
    rows = [server.sequence(400) for _ in range(2)]
    carried_out(server, [(rows[0], 150), (rows[1], 187)])
    carried_out(server, [(one, fresh) for one in rows])  # what backends make once of a form
    for _ in range(30):
        _, planning, attending = carried_out(server, [(one, fresh) for one in rows])
        assert planning.waits == ["steps.of_device: a copy to the host"]
        assert not attending.waits
        assert attending.launches.count("put") == 2
