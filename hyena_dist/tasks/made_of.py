"""What a result was made of: the weights it started from, the model, every setting that decides what is learnt, and
the sequences. It is written beside each run. A later start that asks for something else in the same directory is
refused, so that no result is handed back for other settings, and no mean is taken over different experiments.

On what a run is computed (precision, micro-batches, ranks, engine) is not compared: a resume may change it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyena_dist.config.errors import ConfigError, one_line
from hyena_dist.config.identity import FIXED, identity
from hyena_dist.config.load import read_config
from hyena_dist.config.plain import read_object
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.config.sections.model import BEFORE_THE_KEY
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.runtime.files import write_whole

RECORD, RESULT = "made_of.json", "result.json"
START, TABLE = "finetune.from", "finetune.table"
"""These two are known by their content: {"path": where it was, "sha256": of it, null where that was not noted}."""
_DECIDE = frozenset({"train.steps", "train.global_batch_size", "train.seed", "train.eval_every", "train.patience",
                     "finetune.lr_decay"})
"""Beside the model, the optimizer and what no resume may change of fine-tuning. Validations decide which weights are
judged."""
_OF_KMERS = ("finetune.task", "finetune.rc", "finetune.bin_size", "finetune.bins_cut", "finetune.diagonals",
             "train.seed", TABLE)
_YOUNGER = {**{f"finetune.{key}": value for key, value in asdict(FinetuneSection()).items()},
            **{f"optim.{key}": value for key, value in json.loads(json.dumps(asdict(OptimSection()))).items()},
            **{f"model.{key}": value for key, value in BEFORE_THE_KEY.items()}}
"""What a key meant before there was one: a record may be older than it."""


def made_of(config: Config, sequences: str | None, start: str | None) -> dict[str, Any]:
    """Every key that decides what a run learns, plain JSON.

    Args:
        sequences: digest of the labelled sequences in their splits; None: it is not known.
        start: digest of the weights of `finetune.from`; None: it is not known, or there are none.
    """
    tune = config.finetune
    keys = {key: value for key, value in identity(config).items() if key.startswith(("model.", "optim."))
            or key in _DECIDE or (key.startswith("finetune.") and key in FIXED)}
    return {START: None if tune.from_ is None else {"path": tune.from_, "sha256": start},
            TABLE: {"path": tune.table, "sha256": sequences}, **keys}


def of_kmers(made: Mapping[str, Any]) -> dict[str, Any]:
    """The part of it that the regression on k-mers depends on."""
    return {key: made[key] for key in _OF_KMERS}


def check_made_of(run_dir: Path, made: Mapping[str, Any]) -> None:
    """Refuse a directory with a result or checkpoints that were made of something else.

    Raises:
        ConfigError: they were, or what they were made of cannot be read.
    """
    if (run_dir / RESULT).is_file() or any((run_dir / "checkpoints").glob("step-*")):
        path = run_dir / RECORD
        _refuse_other(run_dir, _YOUNGER | read_found(path) if path.is_file() else _before_records(run_dir), made)


def check_kmers(path: Path, found: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Refuse what a regression on k-mers has found of something else.

    Args:
        found: its file, which has "made_of"; of a version without records, the digest of its sequences.
        made: as `of_kmers` gives it.

    Raises:
        ConfigError: as `check_made_of`.
    """
    _refuse_other(path, found.get("made_of", {TABLE: {"path": "", "sha256": found.get("sequences")}}), made)


def _refuse_other(place: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse what was made of something else.

    Args:
        place: what is to be removed if it is not wanted any more.
        then: of what there is; a key that it lacks is not known, and not compared.

    Raises:
        ConfigError: naming each key with both values.
    """
    if other := [f"{key}{' (which finetune.epochs sets)' * (key == 'train.steps')} was {_said(then[key])} and is now "
                 f"{_said(value)}" for key, value in now.items() if key in then and _differs(then[key], value)]:
        raise ConfigError(f"{place} holds a result or a run of other settings: {'; '.join(other)}: set them as they "
                          "were, choose another train.run_dir, or remove it")


def keep_made_of(run_dir: Path, made: Mapping[str, Any]) -> None:
    """Write it down.

    Raises:
        OSError: it could not be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / RECORD, lambda aside: aside.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8"))


def read_found(path: Path, remedy: str = "remove it, and it is made anew") -> dict[str, Any]:
    """The object in a file of an earlier start.

    Args:
        remedy: for the message.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({one_line(error)}): {remedy}") from None


def _before_records(run_dir: Path) -> dict[str, Any]:
    """What is known of a run of a version that wrote no record: its configuration where it has one (a probe has none),
    and what its result says."""
    config, result = run_dir / "config.yaml", run_dir / RESULT
    known = made_of(read_config(config), None, None) if config.is_file() else {}
    known[TABLE] = {"path": "", "sha256": None}  # a checkpoint of the run knows the digest, and the trainer compares it
    if result.is_file():
        found = read_found(result)
        start = found.get("from")
        known |= {**found.get("settings", {}), START: None if start is None else {"path": start, "sha256": None},
                  TABLE: {"path": "", "sha256": found.get("sequences")}}
    return known


def _differs(then: Any, now: Any) -> bool:
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return bool(then != now)
    if then["sha256"] is not None:
        return bool(then["sha256"] != now["sha256"])
    return bool(then["path"] and Path(then["path"]).resolve() != Path(now["path"]).resolve())


def _said(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    digest = "" if value["sha256"] is None else f"content {value['sha256'][:12]}"
    return " with ".join(filter(None, (value["path"], digest)))
