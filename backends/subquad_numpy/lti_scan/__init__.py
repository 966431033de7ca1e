"""The scan of a fixed diagonal state-space model, compiled, and its gradient."""
