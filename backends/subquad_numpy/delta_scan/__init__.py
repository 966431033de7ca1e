"""The scan of the delta rule, compiled, and its gradient."""
