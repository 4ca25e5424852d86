"""HyenaDNA models in other layouts: the published code's, Hugging Face's, safetensors, and checkpoints of this package.

`from_published` and `to_published` work on dictionaries, `read_model` and `write_model` on directories.
"""

from hyena_dist.config.formats import FORMATS
from hyena_dist.convert.directory import read_model, resized, write_model
from hyena_dist.convert.lightning import load_lightning
from hyena_dist.convert.published import from_published, model_section, to_published
from hyena_dist.convert.section import ConversionError

__all__ = ["FORMATS", "ConversionError", "from_published", "load_lightning", "model_section", "read_model", "resized",
           "to_published", "write_model"]
