"""The nearest of m centres, and the sums of the rows of each, compiled."""
