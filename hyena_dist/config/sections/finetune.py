"""Fine-tuning: which labelled sequences a pretrained model learns, and how its answers are judged."""

from dataclasses import dataclass

from hyena_dist.config.sections.ranges import not_negative, one_of, positive, probability

TRAINED = ("all", "head", "lora", "probe", "prompt")
BASELINES = ("kmers", "cnn", "scratch")
WHOLE, PLACES = ("classification", "multilabel", "regression"), ("per_base", "binned", "pairs")
TASKS = WHOLE + PLACES
"""With one answer for a sequence, and with answers for its bases, bins, or pairs of bins."""
POOLINGS = ("mean", "last", "first", "max", "sum")


def words_of(listed: str) -> list[str]:
    """The words of a key whose values are separated by commas."""
    return [word.strip() for word in listed.split(",") if word.strip()]


@dataclass(frozen=True, kw_only=True)
class FinetuneSection:
    """What `hyena-dist finetune` learns. Other commands do not read it."""

    from_: str | None = None
    """Written `finetune.from`: the pretrained model, as a run, a checkpoint, or a directory of published weights. The
    model section is taken from it, but for the dropouts. null: the model of this configuration with fresh weights."""
    table: str = ""
    """The labelled sequences: a CSV, TSV or parquet file with a header, a FASTA file whose labels are the last `|`
    field of each header, intervals (with finetune.genome), or a directory with one such file for each of train, dev and
    test."""
    valid: str | None = None
    """A further file, of the sequences to choose the weights by; null: finetune.split_column, the directory's dev file,
    or else a part of the training sequences."""
    test: str | None = None
    """A further file, of the sequences on which the chosen weights are judged once, at the end."""
    genome: str | None = None
    """The FASTA file that the intervals of a table (BED, or columns in any order under a header) are cut out of."""
    sequence_column: str = "sequence"
    """Name of the column of sequences."""
    label_column: str = "label"
    """Name of the column of labels; several labels of a row (multilabel) are separated by semicolons, or are a 0 or 1
    for each class."""
    split_column: str | None = None
    """Name of a column that says train, valid (or val, dev) or test of each row; null: `split`, where there is one."""
    valid_fraction: float = 0.1
    """Part of the training sequences, drawn by train.seed, to choose the weights by, where nothing else says which."""
    valid_chromosomes: str | None = None
    """Chromosomes of intervals to choose the weights by, separated by commas, in place of a random part."""
    test_chromosomes: str | None = None
    """Chromosomes of intervals to judge by, separated by commas."""
    task: str = "classification"
    """Of a whole sequence: classification, one of n classes; multilabel, any of n; regression, a number. per_base: a
    class for each base. binned: numbers for each bin, one for each track. pairs: a number for each pair of bins, as in
    contact maps."""
    pooling: str = "mean"
    """How the hidden states of a sequence become one vector: mean, last, first, max or sum, over its own bases only.
    The tasks of bases and bins do not read it."""
    bin_size: int = 128
    """Bases of a bin; 1 gives numbers for each base."""
    bins_cut: int = 0
    """Bins at either end of a sequence that have no labels."""
    diagonals: int = 2
    """How far apart two bins are at least to have a label as a pair: 2 leaves out each bin with itself and with its
    neighbours."""
    loss: str = "squared"
    """Of binned: squared, or poisson, for counts that are not negative."""
    trained: str = "all"
    """all: every weight; head: the new head alone, on a backbone that stays as it is; lora: the head and low-rank
    adapters of the backbone's products; probe: regressions and a forest of scikit-learn on the pooled states of a
    backbone that stays as it is, which are computed once; prompt: vectors in front of each sequence, and the class is
    the token that the language model says next."""
    prompt_tokens: int = 32
    """How many vectors of trained=prompt."""
    shots: int | None = None
    """A number: each sequence is shown behind so many labelled training sequences of each class, their labels are
    tokens, and the class is the token that the language model says next. null: no examples, and a head of its own."""
    lora_rank: int = 8
    """Rank of the adapters of trained=lora."""
    lora_alpha: float = 16.0
    """What an adapter gives is multiplied by lora_alpha / lora_rank."""
    lora_targets: str | None = None
    """The products that get adapters, by their names in a layer, separated by commas: in_proj, out_proj, fc1, fc2, or
    of attention qkv_proj. null: all of them."""
    lr_decay: float = 1.0
    """Layer-wise learning rates: the head and the final norm have optim.lr, the last layer lr_decay times that, and
    each layer before it lr_decay times that of the layer behind it; the embedding comes below the first layer."""
    longer: str = "refuse"
    """What becomes of a sequence that is longer than the model: refuse; or keep its left, center or right part."""
    rc: str = "none"
    """none; augment: each training sequence comes, by chance of one half, as its reverse complement; average: that, and
    answers are means over both strands, taken before the softmax."""
    baselines: str = "kmers,cnn,scratch"
    """What stands beside a result, on the same sequences, separated by commas: kmers, a regression on counts of k-mers,
    of labels of places on those around a place, and then with it their mean; cnn, a small convolutional network, for
    labels of whole sequences; scratch, the same model with fresh weights, all of them trained. The last two are trained
    for as many steps as the model itself. Empty: nothing."""
    epochs: float | None = None
    """How often every training sequence is seen; sets train.steps. null: train.steps counts."""
    seeds: int = 1
    """How many runs, from train.seed upwards: they differ in the order, the random part for validation, and the first
    values of a head that starts afresh."""

    def __post_init__(self) -> None:
        one_of("finetune", "task", self.task, TASKS)
        one_of("finetune", "pooling", self.pooling, POOLINGS)
        one_of("finetune", "trained", self.trained, TRAINED)
        one_of("finetune", "longer", self.longer, ("refuse", "left", "center", "right"))
        one_of("finetune", "rc", self.rc, ("none", "augment", "average"))
        one_of("finetune", "loss", self.loss, ("squared", "poisson"))
        if self.loss == "poisson" and self.task != "binned":
            raise ValueError(f"finetune.loss=poisson is of finetune.task=binned, and the task is {self.task}: leave it "
                             "out")
        positive("finetune", bin_size=self.bin_size)
        not_negative("finetune", bins_cut=self.bins_cut, diagonals=self.diagonals)
        if self.task in PLACES and self.longer != "refuse":
            raise ValueError(f"finetune.longer={self.longer} would cut sequences whose labels belong to places "
                             f"(finetune.task={self.task}): leave it out, and give shorter sequences with their labels")
        probability("finetune", valid_fraction=self.valid_fraction)
        if self.valid_fraction == 0:
            raise ValueError("finetune.valid_fraction must be greater than 0: weights are chosen by what is not "
                             "trained on")
        if not 1 <= self.seeds <= 1000:
            raise ValueError(f"finetune.seeds must be from 1 to 1000, got {self.seeds}")
        if self.epochs is not None and not 0 < self.epochs <= 100_000:
            raise ValueError(f"finetune.epochs must be greater than 0, at most 100000, got {self.epochs}")
        positive("finetune", prompt_tokens=self.prompt_tokens)
        not_negative("finetune", shots=self.shots or 0)
        if self.by_tokens and self.task != "classification":
            raise ValueError(f"finetune.trained=prompt and finetune.shots write a class as a token, and "
                             f"finetune.task={self.task} has no such answer: take finetune.trained=lora, and no "
                             "finetune.shots")
        if self.shots is not None and self.trained in ("head", "probe"):
            raise ValueError(f"finetune.shots gives answers without a head, and finetune.trained={self.trained} trains "
                             "nothing else: take all, lora or prompt")
        if self.trained == "probe" and self.task in PLACES:
            raise ValueError(f"finetune.trained=probe learns one answer for a sequence, and finetune.task={self.task} "
                             "has many: take finetune.trained=head")
        if self.trained != "all" and self.from_ is None:
            raise ValueError(f"finetune.trained={self.trained} needs a pretrained model: give it as finetune.from")
        for word in words_of(self.baselines):
            one_of("finetune", "baselines", word, BASELINES)
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"finetune.lr_decay must be greater than 0, at most 1, got {self.lr_decay}")
        positive("finetune", lora_rank=self.lora_rank, lora_alpha=self.lora_alpha)

    @property
    def by_tokens(self) -> bool:
        """Whether answers are tokens of the vocabulary."""
        return self.trained == "prompt" or self.shots is not None
