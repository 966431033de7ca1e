"""Measurements of the CUDA kernels on a device, beside their floors and beside other implementations."""
