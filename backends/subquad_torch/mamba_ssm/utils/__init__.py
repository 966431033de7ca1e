"""Generation and checkpoints."""
