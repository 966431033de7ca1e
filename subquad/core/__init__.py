"""What attention and scans stand on: choice of kernels, loading of backends, checks, shapes, dtypes, states, blocks."""
