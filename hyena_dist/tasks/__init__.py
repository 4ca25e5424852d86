"""What is done with a trained model: evaluation beside Markov chains."""
