"""Scaling laws: what the loss of finished runs says about the best size, data, length and learning rate of the next."""
