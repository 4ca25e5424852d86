"""The life of processes: how they start and meet, agree, answer signals, watch each other, hold a run directory and
log. Nothing of models or training."""
