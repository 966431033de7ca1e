"""The tables from which tests are made: libraries, methods, scans and kernels, and the definitions of methods."""
