"""Models of transformers as they are and accelerated: `python -m asv_benchmarks.accelerate`."""
