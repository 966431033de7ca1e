"""What the CUDA kernels reach on a device, beside their floors and beside what else there is."""
