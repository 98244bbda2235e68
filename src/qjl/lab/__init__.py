"""Evaluations, benchmarks, report and plots: what measures the library. Nothing but the command line imports it.

What it needs beyond the library comes with ``pip install 'qjl[lab]'``.
"""
