"""Tensor mathematics of the model, without process groups: the Hyena operator, convolutions, implicit filter, norm,
MLP, and the backends that compute them."""
