"""float16 to float32 and back, compiled."""
