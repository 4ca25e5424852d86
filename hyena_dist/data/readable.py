"""What of sequences a model reads: no more bases than it takes, and of other letters that they are there."""

from hyena_dist.data.errors import DataError
from hyena_dist.data.tables import Example


def crop(splits: dict[str, list[Example]], longer: str, most: int, *, otherwise: str) -> list[str]:
    """Refuse or cut, in place, what is longer than the model, and note how many were cut.

    Args:
        longer: as `finetune.longer`.
        most: bases that the model takes.
        otherwise: what to do about a sequence that is refused.

    Raises:
        DataError: a sequence is longer, and `longer` is refuse.
    """
    cropped = 0
    for name, examples in splits.items():
        for number, example in enumerate(examples):
            over = example.length - most
            if over <= 0:
                continue
            if longer == "refuse":
                raise DataError(f"{example.where}: has {example.length:,} bases, and the model takes {most:,}: "
                                f"{otherwise}")
            first = {"left": 0, "center": over // 2, "right": over}[longer]
            examples[number] = example.part(first, most)
            cropped += 1
        splits[name] = examples
    return [f"{cropped:,} sequences were longer than {most:,} bases, and their {longer} part was kept"] * bool(
        cropped)


def foreign(splits: dict[str, list[Example]]) -> list[str]:
    """How many letters are no base that the model knows, if any."""
    bases = letters = sequences = 0
    for examples in splits.values():
        for example in examples:
            odd = len(example.bases.translate(None, b"ACGTacgt"))
            bases, letters, sequences = bases + example.length, letters + odd, sequences + bool(odd)
    return [f"{letters:,} of {bases:,} bases, in {sequences:,} sequences, are no A, C, G or T: the model sees N or "
            "[UNK] there"] * bool(letters)
