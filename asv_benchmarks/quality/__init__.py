"""How well trained models work when each layer's attention is replaced by an approximation."""
