"""Ranks, and nothing of Hyena: groups, collectives that autograd knows, slices of tokens, the distributed
transform."""
