"""Whole language models on the CPU: tokens per second of a prompt and of generation, and memory.

    python -m asv_benchmarks.throughput            a Mamba and a transformer of equal size, batch 1 … 32
    python -m asv_benchmarks.throughput --peers    one Mamba by each library, by transformers and by llama.cpp

Weights are random. Every case runs in a process of its own, one after the other.
"""
