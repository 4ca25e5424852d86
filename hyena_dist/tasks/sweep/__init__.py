"""Many runs as one: a file of axes becomes points, each with a state on disk, and points become a table of results."""
