"""Means of segments of rows, compiled."""
