"""New sequence from a trained model."""
