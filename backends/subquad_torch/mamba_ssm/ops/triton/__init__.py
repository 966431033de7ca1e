"""What the original writes in Triton; here it runs on any device."""
