"""The causal depthwise convolution, compiled, and its gradient."""
