"""Attention over intervals and listed blocks of keys, compiled: forward pass, gradient, calls and launches."""
