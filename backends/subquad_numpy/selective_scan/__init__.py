"""The selective scan, compiled, and its gradient."""
