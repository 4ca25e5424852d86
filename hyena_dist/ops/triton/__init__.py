"""The Hyena operator in Triton kernels. Imported by `ops.backends` alone, where it is asked for: the extra `kernels`
installs Triton.

Layouts: p [B, N + 1, C, L] holds the projection's x0 | x1 | ... | v, q what the short convolution makes of it,
u = x_{N-1} v. Grids put channels and rows on their second and third axes; rows begin at 64-bit offsets, places in a row
are 32-bit.
"""
