"""Errors that are a user's to mend: commands print them as one line and end with status 2. All others are defects."""


class UserError(ValueError):
    """Something that the user gave cannot be used; the message names the file, key or position, and the remedy."""


class ConfigError(UserError):
    """A configuration that cannot be run."""
