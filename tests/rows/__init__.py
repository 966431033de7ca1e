"""The tables from which tests are made: libraries, methods, scans, kernels, and what they are called by definition."""
