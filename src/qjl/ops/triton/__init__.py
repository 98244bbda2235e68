"""Ops in Triton, for CUDA tensors; under ``TRITON_INTERPRET=1`` for tensors on a CPU, slowly.

``ops`` holds them, and is imported when they are first called: importing Triton takes a while, and it may be missing.
"""
