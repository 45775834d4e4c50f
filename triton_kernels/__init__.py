"""Triton kernels for pruned weights, one a file: documentation, plain-torch reference, launcher, kernel.

This folder imports torch and triton only and knows nothing of fxprune, so a kernel can be read, run and
copied alone. It is installed as `fxprune.triton_kernels`. Importing it needs neither triton nor a GPU.
"""
