"""Attention without Numba: NumPy alone, with reused memory."""
