"""asv's results as one page that needs no network; see `__main__` for the command."""
