"""Errors that commands print as one line. All others are defects."""


class UserError(ValueError):
    """Something that the user gave cannot be used; the message names the file, key or position, and the remedy. A
    command ends with status 2."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the step and the last good checkpoint. Its command ends with status
    1."""
