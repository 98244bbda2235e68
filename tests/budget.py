"""Whether a step is right: by kernels within the budget of the codes that they read, by the reference up to rounding.

Kernels trade precision that a model's answers cannot show for speed (``NibbleForm.error_budget``).
"""

import torch

from qjl import ops

EXACT = 1e-4  # of the worst row, where nothing is traded
WORST = 5  # budgets that one row may be off


def relative_errors(out, truth):
    """Of each row, over its norm; a row of nothing must be 0."""
    size = truth.norm(dim=-1)
    assert not out[size == 0].any()
    return (out - truth).norm(dim=-1) / size.clamp(min=1e-30)


def assert_within(errors, budget):
    """The worst row, and the root mean square of all; few rows may lie further off together than many."""
    assert errors.max() <= WORST * budget
    assert errors.square().mean().sqrt() <= budget * max(1, WORST / errors.numel() ** 0.5)


def assert_within_budget(out, truth, pool, times=1):
    """Outputs of attention over a pool."""
    errors = relative_errors(out, truth)
    if trades():
        assert_within(errors, times * pool.error_budget)
    else:
        assert errors.max() < times * EXACT


def assert_log_sums_within_budget(lse, truth, pool):
    """A log-sum-exp is off by the mean of what its logits are off, and those of a row by about the budget."""
    most = WORST * pool.error_budget if trades() else EXACT
    torch.testing.assert_close(lse.double(), truth, rtol=0, atol=most)


def trades():
    """Whether the backend in use does."""
    return ops.active_backend() != "reference"
