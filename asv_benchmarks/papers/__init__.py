"""The tables of the papers again, on this machine: one file per table, one row per way to compute it."""
