"""Scans and norms as functions."""
