"""The training loop and what it writes: trainer, optimizer, schedules, curriculum, validation, metrics, report."""
