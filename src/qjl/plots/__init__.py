"""Pictures of measurements, drawn from their rows alone."""

from qjl.plots.pareto import frontier
from qjl.plots.steps import benchmark
from qjl.plots.style import require_format
from qjl.plots.whole_models import contexts, throughput

__all__ = ["benchmark", "contexts", "frontier", "require_format", "throughput"]
