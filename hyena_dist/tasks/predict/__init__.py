"""What a fine-tuned model says of new sequences."""
