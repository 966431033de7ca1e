"""The scan of outer products, compiled, and its gradient."""
