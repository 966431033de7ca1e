"""Code that attention and scans share: choice of kernels, loading of backends, checks, dtypes, states, blocks."""
