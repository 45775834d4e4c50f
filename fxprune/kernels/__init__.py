"""Kernels: Triton's for GPUs, C++ for CPUs, and where each can run."""
