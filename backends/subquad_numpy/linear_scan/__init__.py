"""The linear scan, compiled, and its gradient."""
