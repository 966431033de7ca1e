"""The packages that people use today, beside ours: same inputs, one process, interleaved.

A peer is one entry of a table: `attention.PEERS` or `scans.SCAN_PEERS`.
"""
