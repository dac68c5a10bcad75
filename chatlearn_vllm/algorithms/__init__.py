"""The mathematics of reinforcement learning: tensors in, tensors out."""
