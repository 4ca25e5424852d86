"""What a trained model makes of sequences: its hidden states."""
