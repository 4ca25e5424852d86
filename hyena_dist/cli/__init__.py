"""What each command does: its arguments, what it prints, its exit status. `launchers/*.py` and `shards/*.py`, which
people and launchers start, only call it."""
