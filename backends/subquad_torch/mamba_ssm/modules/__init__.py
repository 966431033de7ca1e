"""Mixers and blocks as modules."""
