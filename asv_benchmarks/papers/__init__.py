"""The tables of the papers, measured on this machine: one file for each table, one row for each implementation."""
