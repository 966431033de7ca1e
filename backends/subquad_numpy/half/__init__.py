"""Half precision to float32 and back, compiled."""
