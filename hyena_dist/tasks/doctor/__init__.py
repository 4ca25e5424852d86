"""Looks at the machines that a run is about to use: `examine` gathers what each rank sees, `diagnose` says what is
wrong with it."""
