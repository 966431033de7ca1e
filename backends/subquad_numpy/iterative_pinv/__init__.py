"""Pseudo-inverses of small matrices by iteration, compiled."""
