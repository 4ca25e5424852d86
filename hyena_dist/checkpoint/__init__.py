"""Checkpoints that any number of ranks and any engine reads: their format, the directory that holds them, who saves."""
