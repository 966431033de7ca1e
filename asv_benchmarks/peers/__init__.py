"""The packages that people use today, beside ours: same inputs, one process, interleaved.

A peer is one entry of `PEERS` in attention.py or scans.py.
"""
