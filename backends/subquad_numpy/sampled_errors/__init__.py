"""What an output is off at sampled rows, compiled."""
