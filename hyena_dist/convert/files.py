"""Files of weights: which of a directory's files they are in, what only stands where one should be, and their tensors.

Nothing of a stranger's file is run: tensors are read by safetensors, by torch's weights-only reader, or by the
restricted reader of `convert.lightning`.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hyena_dist.config.errors import first_sentence
from hyena_dist.config.kinds import START_BYTES, Kind, kind_of_text, kind_of_weights, not_as_it_is
from hyena_dist.config.plain import open_regular, read_object
from hyena_dist.convert.lightning import load_torch
from hyena_dist.convert.section import ConversionError

CONFIG, WEIGHTS, PUBLISHED_WEIGHTS = "config.json", "model.safetensors", "weights.ckpt"
_NAMES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", PUBLISHED_WEIGHTS)
"""In the order in which they are looked for, which is that of transformers."""
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(safetensors|bin)")
_LONGEST_HEADER = 100_000_000
"""Bytes, of what safetensors reads."""

logger = logging.getLogger(__name__)


def read_config(path: Path) -> dict[str, Any]:
    """The object in a config.json or in an index of shards.

    Raises:
        ConversionError: it cannot be read, or something else stands there.
    """
    _start_of(path, kind_of_text)
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read ({error})") from error


def read_weights(source: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, or of those of a directory, by the keys that they have there.

    Args:
        source: a file (safetensors, or torch's: a state dict, or a checkpoint of Lightning or DeepSpeed with one in
            it), an index of shards, or a directory with files under the names that transformers and the published code
            give them, or with one file of weights under another name.

    Raises:
        ConversionError: no such file, several, one that is missing, cut short or damaged, or that holds something else.
    """
    if not source.is_dir():
        return _read_index(source) if source.name.endswith(".index.json") else _read_file(source)
    if there := [name for name in _NAMES if _is_there(source / name)]:
        if there[1:]:
            logger.warning("%s: its weights are read from %s, and not from %s: name the file where another is meant",
                           source, there[0], ", ".join(there[1:]))
        return read_weights(source / there[0])
    others = weight_files(source)
    shards = [match for path in others if (match := _SHARD.fullmatch(path.name))]
    if others and len(shards) == len(others) and len({(shard["stem"], shard["count"]) for shard in shards}) == 1:
        numbered = {int(shard["number"]): shard.string for shard in shards}
        for number in range(1, int(shards[0]["count"]) + 1):
            if number not in numbered:
                wanted = shards[0].string.replace(f"-{shards[0]['number']}-of-", f"-{number:05}-of-")
                raise ConversionError(f"{source / wanted}: no such file, and the others of its set are there: fetch it")
        return _together(source, numbered.values())
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise ConversionError(f"{source} has several files of weights ({names}): name the one that is meant")
    if not others:
        raise ConversionError(f"{source}: no file of weights: {WEIGHTS}, pytorch_model.bin, {PUBLISHED_WEIGHTS}, or "
                              f"one of another name that ends in {', '.join(_ENDINGS)}")
    return _read_file(others[0])


def weight_files(directory: Path) -> list[Path]:
    """The files of a directory that may hold weights, by their names' ends."""
    return sorted(path for path in directory.iterdir() if path.suffix in _ENDINGS)


def _is_there(path: Path) -> bool:
    """Also where it is a link to nowhere, which must not be passed over for another file."""
    return path.exists() or path.is_symlink()


def _read_index(path: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index of shards lists, which is {"weight_map": {key: name of a file}}."""
    weight_map = read_config(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
        raise ConversionError(f"{path}: its weight_map is no object of keys and of names of files beside it")
    for name, count in Counter(weight_map.values()).items():
        if not _is_there(path.parent / name):
            raise ConversionError(f"{path.parent / name}: no such file, and {path.name} lists {count} weights in it: "
                                  "fetch it")
    tensors = _together(path.parent, sorted(set(weight_map.values())))
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise ConversionError(f"{path.parent / weight_map[missing[0]]}: has no {missing[0]}, which {path.name} lists "
                              f"({len(missing)} weights in all are missing): fetch the files that belong together")
    return tensors


def _together(directory: Path, names: Iterable[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        found = _read_file(directory / name)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ConversionError(f"{directory / name}: has {twice[0]}, which is in another file of its set too: fetch "
                                  "the files that belong together")
        tensors |= found
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    """Of which library a file is, its first bytes say: a name can be wrong."""
    start = _start_of(path, lambda start: None if _is_safetensors(start) else kind_of_weights(start))
    if not _is_safetensors(start) and (path.suffix != ".safetensors" or start.startswith((b"PK", b"\x80"))):
        return load_torch(path)
    try:
        return load_file(path)
    except Exception as error:  # noqa: BLE001 - a damaged file raises anything
        raise ConversionError(f"{path}: no readable safetensors file ({first_sentence(error)}): it is cut short or "
                              f"damaged ({path.stat().st_size:,} bytes): fetch it again") from error


def _is_safetensors(start: bytes) -> bool:
    """By the length of its header and the header, which is JSON."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER


def _start_of(path: Path, kind_of: Callable[[bytes], Kind | None]) -> bytes:
    """The first bytes of a file.

    Raises:
        ConversionError: it cannot be read, is empty, or of a kind that its reader does not take.
    """
    try:
        with open_regular(path) as file:
            start = file.read(START_BYTES)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise ConversionError(f"{path}: is empty, its download or copy has failed: fetch it again")
    if kind := kind_of(start):
        raise ConversionError(not_as_it_is(kind, path, f"converted{path.suffix}"))
    return start
