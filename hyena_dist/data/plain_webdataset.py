"""Shards in loops that have WebDataset alone, and do not need the order of windows that training has:

    dataset = webdataset.WebDataset(urls, shardshuffle=False).map(decode_segment).compose(windows(seq_len=1024))

Such a loop reads its shards from end to end. It resumes nowhere but at their start, and what comes depends on its
workers and shuffling; `stream.TrainStream` is for runs that must not. Ids are those of single bases;
`tokenizer.Tokenizer.of_bases` makes k-mers of a window's.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from hyena_dist.data import segment
from hyena_dist.data.errors import DataError
from hyena_dist.data.tokenizer import BYTE_TO_ID

_FIELDS = ("contig", "start", "end", "split", "species")


def decode_segment(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The segments of a sample as WebDataset reads it: for `WebDataset.map`.

    Returns:
        For each of its segments contig, start, end, split, species and `ids`, token ids, uint8 [end - start].

    Raises:
        DataError: the sample is damaged, or is none of these shards.
    """
    try:
        about = json.loads(sample["json"])
        ids = BYTE_TO_ID[segment.decode(sample["seg"])]
        count = max(len(value) if isinstance(value, list) else 1 for value in about.values())
        columns = [about[field] if isinstance(about[field], list) else [about[field]] * count for field in _FIELDS]
        rows = [dict(zip(_FIELDS, values, strict=True)) for values in zip(*columns, strict=True)]
        places = np.cumsum([0, *(row["end"] - row["start"] for row in rows)]).tolist()
        if places != sorted(places) or places[-1] != ids.size:
            raise ValueError("it says other segments than it holds")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        where = f"{sample.get('__url__', 'a shard')}: sample {sample.get('__key__', '?')}"
        raise DataError(f"{where} is no sample of segments ({error}); run shards/verify.py") from None
    return [{**row, "ids": ids[start:end]} for row, start, end in zip(rows, places, places[1:], strict=False)]


def windows(seq_len: int, split: str = "train") -> Callable[[Iterable[list[dict[str, Any]]]], Iterator[dict[str, Any]]]:
    """Cuts the segments of a split into windows: for `WebDataset.compose`.

    A window has seq_len + 1 bases, of which the last is the target of the one before it, and the next window begins
    with that base. Segments of one stretch that come after each other, as they do in shards, are cut as one; what is
    left at the end of a stretch and is shorter than a window is left out. Each window is a dictionary of contig, start,
    end, split, species and `ids`, uint8 [seq_len + 1].

    Raises:
        ValueError: seq_len is not at least 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")

    def cut(samples: Iterable[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        held: dict[str, Any] | None = None
        for row in (row for sample in samples for row in sample if row["split"] == split):
            if held and (held["contig"], held["species"], held["end"]) == (row["contig"], row["species"], row["start"]):
                row = {**row, "start": held["start"], "ids": np.concatenate((held["ids"], row["ids"]))}
            ids, start = row["ids"], row["start"]
            while ids.size > seq_len:
                yield {**row, "start": start, "end": start + seq_len + 1, "ids": ids[: seq_len + 1]}
                ids, start = ids[seq_len:], start + seq_len
            held = {**row, "start": start, "ids": ids}

    return cut
