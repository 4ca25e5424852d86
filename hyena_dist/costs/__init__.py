"""FLOPs, bytes, memory and utilisation of a configuration, by formula: nothing is run."""
