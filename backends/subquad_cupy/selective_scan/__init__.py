"""The selective scan on CUDA: the source of its kernels, how they are launched, and what they are given."""
