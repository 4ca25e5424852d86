"""The one exception for data that cannot be used."""

from hyena_dist.config.errors import UserError


class DataError(UserError):
    """Input data or shards that cannot be used; the message names the file and the place, and says what to do."""
