"""The one exception for data that cannot be used."""


class DataError(ValueError):
    """Input data or shards that cannot be used; the message names the file and the place, and says what to do."""
