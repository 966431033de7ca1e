"""Nyström attention of short sequences in one run."""
