"""Evaluations, all of them through the packed codes: every measured token is decoded over the quantized cache."""
