"""Pictures of measurements, drawn from their rows alone."""

from qjl.plots.answers import heatmap, problems, tasks
from qjl.plots.codes import encoding, scans
from qjl.plots.losses import distortion, perplexity, seeds
from qjl.plots.pareto import frontier
from qjl.plots.steps import benchmark
from qjl.plots.style import require_format
from qjl.plots.whole_models import contexts, engines, generation, serving, throughput

__all__ = [
    "benchmark",
    "contexts",
    "distortion",
    "encoding",
    "engines",
    "frontier",
    "generation",
    "heatmap",
    "perplexity",
    "problems",
    "require_format",
    "scans",
    "seeds",
    "serving",
    "tasks",
    "throughput",
]
