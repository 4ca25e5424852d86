"""GUE, the benchmark of DNABERT-2 (Zhou et al. 2023): 28 data sets of short sequences, each as train.csv, dev.csv and
test.csv with the header `sequence,label`."""

from collections.abc import Iterator
from pathlib import Path

from hyena_dist.data.tables import Example
from hyena_dist.tasks.suites.description import MissingFiles, Published, Suite, Task
from hyena_dist.tasks.suites.rows import TABLES, example_of, table_rows, with_ending

WHERE = ("its authors publish GUE.zip at https://github.com/MAGICS-LAB/DNABERT_2 (section Data); give the directory "
         "with EMP, mouse, prom, splice, tf and virus as --data")
_FILES = {"train": "train", "dev": "valid", "test": "test"}

_MARKS = ("H3", "H3K14ac", "H3K36me3", "H3K4me1", "H3K4me2", "H3K4me3", "H3K79me3", "H3K9ac", "H4", "H4ac")
_EPOCHS = {"prom_300_all": 4, "prom_300_notata": 4, "prom_300_tata": 10, "prom_core_all": 4, "prom_core_notata": 4,
           "prom_core_tata": 10}
_DNABERT2 = {
    **dict(zip((f"EMP/{mark}" for mark in _MARKS),
               (.7827, .5257, .5688, .5052, .3113, .3627, .6739, .5563, .8071, .5043), strict=True)),
    "prom/prom_300_all": .8677, "prom/prom_300_notata": .9427, "prom/prom_300_tata": .7159, "prom/prom_core_all": .6937,
    "prom/prom_core_notata": .6804, "prom/prom_core_tata": .7417, "splice/reconstructed": .8499, "virus/covid": .7102,
    **dict(zip((f"mouse/{n}" for n in range(5)), (.5676, .8477, .7932, .6647, .5266), strict=True)),
    **dict(zip((f"tf/{n}" for n in range(5)), (.7199, .7606, .6652, .5854, .7743), strict=True))}


def files(task: Task, data: Path) -> list[Path]:
    """The three files of a task: in directories as they are published, or side by side as EMP_H3_train.csv."""
    places = (data / task.name, data / "GUE" / task.name)
    found = []
    for name in _FILES:
        stems = [*(place / name for place in places), data / f"{task.name.replace('/', '_')}_{name}"]
        paths = [path for stem in stems for path in with_ending(stem, TABLES)]
        if not paths:
            raise MissingFiles(f"{places[0] / name}.csv: the {name} file of {task.name} is not there",
                               WHERE)
        found.append(paths[0])
    return found


def read(task: Task, paths: list[Path], notes: list[str]) -> Iterator[Example]:
    """See `description.Reader`."""
    del task, notes
    for path, split in zip(paths, _FILES.values(), strict=True):
        for where, values in table_rows(path, ("sequence", "label")):
            yield example_of(values, where, split)


def _task(name: str, epochs: int, metric: str = "mcc", **keys: object) -> Task:
    return Task(name=name, metric=metric, splits=tuple(_FILES.values()), keys={"finetune.epochs": epochs, **keys})


GUE = Suite(
    name="gue-dnabert2",
    protocol="the published train, dev and test files; batch 32, epochs by task (3 to 10), weights by the dev file, "
             "MCC (covid: macro F1); 3 seeds",
    differs="the learning rate is the better on dev of 3e-5, DNABERT-2's, and 6e-4, HyenaDNA's; weights are kept by "
            "the loss on dev, not by its metric, after each epoch",
    where=WHERE,
    tasks=(*(_task(f"EMP/{mark}", 3) for mark in _MARKS), *(_task(f"mouse/{n}", 5) for n in range(5)),
           *(_task(f"prom/{name}", epochs) for name, epochs in _EPOCHS.items()), _task("splice/reconstructed", 5),
           *(_task(f"tf/{n}", 3) for n in range(5)), _task("virus/covid", 8, "f1_macro")),
    keys={"finetune.task": "classification", "finetune.pooling": "mean", "finetune.rc": "none", "finetune.seeds": 3,
          "train.global_batch_size": 32, "optim.weight_decay": 0.01},
    grid={"optim.lr": (3e-5, 6e-4)}, warmup=0.05, files=files, read=read,
    published=(Published(model="DNABERT-2 (117M)", source="Zhou et al. 2023, arXiv 2306.15006, table of GUE",
                         values=_DNABERT2, checked=False),))
