"""Products of few rows with a matrix of weights, compiled: each weight is read once, in the dtype it is stored in."""
