"""Attention without compiled kernels: NumPy alone, with reused memory."""
