"""The model and the only place that knows both Hyena and ranks: embedding, blocks, mixers, head, loss, placement."""
