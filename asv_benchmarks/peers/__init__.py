"""Peers, packages that people use today, beside subquad: equal inputs, one process, calls in turn.

A peer is one entry of `PEERS` in attention.py or scans.py.
"""
