"""The regression gate: is the working tree slower than a base commit? See `__main__` for the command."""
