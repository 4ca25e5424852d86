"""The Hyena operator of order 2 in Triton kernels. Imported by `ops.backends` alone, where it is asked for: the
extra `kernels` installs Triton.

Layouts: p [B, 3, C, L] holds the projection's x0 | x1 | v, q what the short convolution makes of it, u = x1 v. Grids
put channels and batch on their second and third axes; rows begin at 64-bit offsets, places in a row are 32-bit.
"""
