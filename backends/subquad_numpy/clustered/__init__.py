"""Attention to clusters of keys, compiled: the kernels `clustered_attention` and `balanced_tree`."""
