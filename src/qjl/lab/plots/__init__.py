"""Pictures of measurements, drawn from their rows alone."""

from qjl.lab.plots.answers import heatmap, problems, tasks
from qjl.lab.plots.decode_step import benchmark
from qjl.lab.plots.encode_and_scan import encoding, scans
from qjl.lab.plots.losses import distortion, perplexity, seeds
from qjl.lab.plots.pareto import frontier
from qjl.lab.plots.style import require_format
from qjl.lab.plots.whole_models import contexts, engines, generation, serving, throughput

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
