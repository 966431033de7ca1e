"""Attention through features, and softmax attention with a small number of keys or of queries, compiled."""
