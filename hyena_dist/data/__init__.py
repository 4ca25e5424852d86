"""Bases on disk and windows from them: reading genomes, building and checking shards, the order of windows, batches.
Nothing of models or ranks beyond their numbers."""
