"""The order of rows by the buckets of a locality-sensitive hash, compiled."""
