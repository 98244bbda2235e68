"""Benchmarks: correctness first, then interleaved repeats of everything compared, from cold caches, in one run."""
