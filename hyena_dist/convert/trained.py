"""What every reader of a trained model opens it by, whatever it is: a run, a checkpoint, or an exported directory."""

from pathlib import Path

from hyena_dist.checkpoint.directory import read_metadata
from hyena_dist.checkpoint.files import MARKER
from hyena_dist.checkpoint.metadata import PRETRAINING
from hyena_dist.convert.directory import read_model
from hyena_dist.convert.section import ConversionError
from hyena_dist.data.tokenizer import NUCLEOTIDES, tokenizer_of
from hyena_dist.model.trained import Trained


def load_trained(source: str | Path, checkpoint: str | None = None, *, single_bases: bool = False) -> Trained:
    """The model in a directory as `read_model` takes it, on the CPU, with float32 weights and arithmetic.

    Args:
        single_bases: refuse a model of k-mers.

    Raises:
        UserError: as `read_model`; or the run's objective was not the next token.
    """
    section, model, path = read_model(source, checkpoint)
    seq_len = section.max_seq_len
    if (path / MARKER).is_file():
        metadata = read_metadata(path)
        if (objective := metadata.get("objective", PRETRAINING)) != PRETRAINING:
            raise ConversionError(f"{path} is of a run whose objective was {objective!r}, and what is read here is the "
                                  "next base: let the program that trained it read it")
        seq_len = min(seq_len, metadata.get("identity", {}).get("data.seq_len") or seq_len)
    if single_bases and tokenizer_of(section) != NUCLEOTIDES:
        raise ConversionError(f"{path}: its tokens are {section.kmer}-mers (model.kmer), and what is asked of it here "
                              "needs a token for each base: give a model of model.kmer=1")
    return Trained(section, model, path, seq_len)
