"""Attention through features, and softmax attention with few keys or few queries, compiled."""
