"""Scores of variants by a trained model, and what they are worth beside labels. On a GPU if there is one; under
torchrun the ranks share the work and write the same file. What is killed goes on where it was: give the same command
again.

commands: variants    score the variants of a VCF or a table
          report      ROC and precision of the scores of such a file against one of its columns
          perplexity  of held-out bases by context, place, species, G and C, case and region, beside Markov chains
          distance    losses and scores while what is further than a distance is cropped, shuffled or masked
          substitutions  whether a model, and a classifier that reads it, notice single changed bases

examples: python launchers/score.py variants --from runs/mine --table calls.tsv --fasta hg38.fa.gz --out scores.tsv
          python launchers/score.py variants --from runs/mine --table brca1.tsv --fasta brca1.fa \\
              --region 17:41196312-41277500 --window 1024 --out brca1.parquet
          torchrun --nproc_per_node 2 launchers/score.py variants --from exported/mine --vcf calls.vcf \\
              --fasta hg38.fa.gz --out scores.vcf.gz
          python launchers/score.py report brca1.parquet --preset brca1 --picture brca1.png
          python launchers/score.py report scores.tsv --label pathogenic --score cadd --by consequence
          python launchers/score.py perplexity --from runs/mine --shards shards/mine --regions genes.gff3.gz \\
              --out perplexity.tsv
          python launchers/score.py distance --from runs/mine --shards shards/mine --out distance.tsv
          python launchers/score.py distance --from runs/mine --shards shards/mine --vcf calls.vcf.gz \\
              --fasta hg38.fa.gz --most 1000 --out distance.tsv
          python launchers/score.py substitutions --from runs/mine --shards shards/mine --out substitutions.tsv
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyena_dist.cli.reading import add_context_option, add_model_options, open_model, quiet
from hyena_dist.cli.status import exit_status
from hyena_dist.config.errors import ConfigError, agreed
from hyena_dist.config.plain import finite
from hyena_dist.runtime.signals import raise_interrupts

if TYPE_CHECKING:
    from hyena_dist.model.trained import Trained
    from hyena_dist.parallel.groups import Groups
    from hyena_dist.tasks.parts import Parts
    from hyena_dist.tasks.score.report import Worth

PRESETS = ("brca1", "clinvar", "traitgym")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    variants = commands.add_parser("variants", help="score the variants of a VCF or a table",
                                   formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_example("variants"))
    _add_model(variants)
    _add_variants(variants, required=True)
    variants.add_argument("--accept-numerics", action="store_true", help="write the file also where the precision "
                          "changes the order of the variants; its header says so")
    variants.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .tsv, .parquet, .vcf or "
                          ".vcf.gz; a VCF of a VCF alone")
    report = commands.add_parser("report", help="the scores of a file against a label",
                                 formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_example("report"))
    report.add_argument("file", type=Path, metavar="FILE", help="a .tsv or .parquet that `variants` wrote")
    report.add_argument("--label", metavar="COLUMN", help="1 or true: pathogenic, causal; 0 or false: not; rows of "
                        "anything else are left out")
    report.add_argument("--preset", choices=PRESETS, help="the label and the classes of a known set")
    report.add_argument("--score", action="append", default=[], metavar="COLUMN", help="another score in the file, as "
                        "conservation or CADD, to compare with; several times")
    report.add_argument("--by", metavar="COLUMN", help="also for each value of this column")
    report.add_argument("--min-stars", type=int, metavar="N", help="of --preset clinvar: stars of the "
                        "review, 0 to 4 (1)")
    report.add_argument("--picture", type=Path, metavar="FILE", help="draw the ROC curves into this .png or .pdf")
    report.add_argument("--json", type=Path, metavar="FILE", help="write what was found to this new .json, too")
    _add_perplexity(commands.add_parser("perplexity", help="of held-out bases, by what they are and what is seen "
                                        "before them", formatter_class=argparse.RawDescriptionHelpFormatter,
                                        epilog=_example("perplexity")))
    _add_distance(commands.add_parser("distance", help="losses and scores while distant sequence is taken away",
                                      formatter_class=argparse.RawDescriptionHelpFormatter,
                                      epilog=_example("distance")))
    _add_substitutions(commands.add_parser("substitutions", help="whether single changed bases are noticed",
                                           formatter_class=argparse.RawDescriptionHelpFormatter,
                                           epilog=_example("substitutions")))
    return parser.parse_args(argv)


def _add_model(command: argparse.ArgumentParser) -> None:
    """A model, and how its windows are read."""
    add_model_options(command)
    command.add_argument("--window", type=int, metavar="N", help="tokens of a sequence that the model reads (default: "
                         "as many as it was trained on)")
    add_context_option(command, "window")


def _add_variants(command: argparse.ArgumentParser, *, required: bool) -> None:
    files = command.add_mutually_exclusive_group(required=required)
    files.add_argument("--vcf", type=Path, metavar="V", help="a VCF, plain, gzip or bgzip")
    files.add_argument("--table", type=Path, metavar="T", help="a table (tsv, csv, parquet) with columns chrom, pos "
                       "(from 1), ref and alt; its other columns are carried over")
    command.add_argument("--fasta", type=Path, required=required, metavar="F", help="the reference, or a slice of it")
    command.add_argument("--region", metavar="C:FIRST-LAST", help="where a slice lies (default: as its header says)")


def _add_distance(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shards", type=Path, required=True, metavar="DIR", help="of whose windows the loss is")
    command.add_argument("--split", choices=("val", "test"), default="val", help="which split (val)")
    command.add_argument("--most", type=int, default=256, metavar="N", help="windows at most, at even distances, and "
                         "variants at most, drawn evenly from those with scores (256)")
    _add_variants(command, required=False)
    _add_model(command)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .tsv or .parquet; a text (.md) "
                         "and a picture (.png) of the same name are written beside it")


def _add_substitutions(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shards", type=Path, required=True, metavar="DIR", help="of whose windows bases are changed")
    command.add_argument("--split", choices=("val", "test"), default="val", help="which split (val)")
    command.add_argument("--bases", type=int, metavar="N", help="of a window (default: as many as the model was "
                         "trained on); the same for models that are compared")
    command.add_argument("--every", type=int, default=64, metavar="N", help="one base in so many is changed (64)")
    command.add_argument("--most", type=int, default=256, metavar="N", help="windows at most, at even distances (256)")
    add_model_options(command)
    command.set_defaults(window=None)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .tsv or .parquet; a text (.md) "
                         "and a picture (.png) of the same name are written beside it")


def _add_perplexity(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shards", type=Path, required=True, metavar="DIR", help="whose split is read, and on whose "
                         "training bases the Markov chains are fitted")
    command.add_argument("--split", choices=("val", "test"), default="val", help="which split (val)")
    command.add_argument("--regions", type=Path, metavar="FILE", help="classes of bases, to be told apart: a BED whose "
                         "fourth column they are, or an annotation (.gff, .gff3, .gtf)")
    command.add_argument("--block", type=int, default=100_000, metavar="N", help="bases of a block of the bootstrap "
                         "by which intervals are made (100000)")
    _add_model(command)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .tsv or .parquet; a text (.md) "
                         "and a picture (.png) of the same name are written beside it")


def _example(command: str) -> str:
    """The examples of a command, out of the description of all."""
    examples = (__doc__ or "").partition("examples: ")[2].replace("\n          ", "\n")
    return "examples:\n" + "\n".join(each for each in examples.replace("\\\n", "\0").splitlines()
                                     if f"score.py {command} " in each).replace("\0", "\\\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 a mistake of the user's, 3 a precision that changes the order of the variants, 130
    or 143 interrupted."""
    args = parse_args(argv)
    quiet()
    commands = {"variants": _variants, "report": _report, "perplexity": _perplexity, "distance": _distance,
                "substitutions": _substitutions}
    return exit_status(lambda: commands[args.command](args))


def _open(args: argparse.Namespace, *, single_bases: bool) -> "tuple[Trained, Groups, int]":
    """The model, over the ranks that there are, and the tokens of its windows."""
    trained, groups = open_model(args, single_bases=single_bases)
    return trained, groups, trained.seq_len if args.window is None else args.window


def _variants(args: argparse.Namespace) -> int:
    from hyena_dist.data.reference import Region, read_reference
    from hyena_dist.data.variants import OUTCOMES, Variants
    from hyena_dist.tasks.score.variants import Request, score_variants

    raise_interrupts()
    region = None if args.region is None else Region.parse(args.region)
    variants = Variants(args.vcf or args.table, is_vcf=args.vcf is not None)
    trained, groups, window = _open(args, single_bases=True)
    reference = read_reference(args.fasta, region)
    request = Request(variants, reference, args.out, window, args.fasta.name, args.accept_numerics)
    result = score_variants(trained, request, groups)
    if groups.world.rank == 0:
        print(f"{args.out}: {result.survey.scored:,} of {sum(result.survey.outcomes.values()):,} alleles scored, "
              f"windows of {window:,} bases, both strands")
        for name, count in result.survey.outcomes.items():
            if count and name != "scored":
                print(f"  {count:,} {name}: {OUTCOMES[name]}")
        for name, count in result.survey.notes.items():
            print(f"  note: {count:,} with scores: {name.replace('_', ' ')}")
        if result.scored_now:
            print(f"  {result.seconds / result.scored_now:.4f} seconds a variant")
    return 0


def _report(args: argparse.Namespace) -> int:
    from hyena_dist.runtime.files import check_new, check_picture, write_durably, write_whole
    from hyena_dist.tasks.columns import check_ending
    from hyena_dist.tasks.score.output import read_scores
    from hyena_dist.tasks.score.report import PRESETS, draw, labels_of, left_out, outcomes, remarks, worths
    from hyena_dist.tasks.score.variants import cost_path

    raise_interrupts()
    if (args.label is None) == (args.preset is None):
        raise ConfigError("give --label COLUMN, or --preset " + " or ".join(PRESETS) + ", and not both")
    if find_spec("sklearn") is None:
        raise ConfigError("scikit-learn is missing, which makes the report: install it with pip install "
                          "'hyena-dist[tasks]'")
    if args.min_stars is not None and (args.preset != "clinvar" or not 0 <= args.min_stars <= 4):
        raise ConfigError(f"--min-stars {args.min_stars}: give 0 to 4, with --preset clinvar alone")
    check_picture(args.picture)
    if args.json is not None:
        check_ending("--json", args.json, [".json"])
        check_new("--json", args.json)
    table = read_scores(args.file)
    labels = (labels_of(table, args.label, args.by) if args.preset is None
              else PRESETS[args.preset](table, args.by, 1 if args.min_stars is None else args.min_stars))
    found = worths(table, labels, args.score)
    cost = json.loads(cost_path(args.file).read_text("utf-8")) if cost_path(args.file).is_file() else {}
    print(f"{args.file}: {labels.says}; {table.facts.get('model', 'unknown model')}, windows of "
          f"{table.facts.get('window', '?')} bases, {table.facts.get('precision', '?')}")
    print(f"  {outcomes(table)}")
    if cost:
        seconds = cost["seconds_per_variant"]
        print(f"  {'not measured' if seconds is None else f'{seconds:.4f}'} seconds a variant, at most "
              f"{cost['peak_memory_bytes'] / 1e9:.2f} GB of memory")
    for remark in remarks(table, labels, args.score):
        print(f"  {remark}")
    _print(found)
    if args.picture is not None:
        draw(table, labels, found, args.picture, f"{args.file.name}: {labels.says}")
    if args.json is not None:
        content = {"file": str(args.file), "label": labels.says, "facts": table.facts, "cost": cost,
                   "unlabelled": labels.unlabelled, "left_out": left_out(table, labels, args.score),
                   "worth": [finite(asdict(worth)) for worth in found]}
        write_whole(args.json, lambda aside: write_durably(aside, json.dumps(content, indent=1) + "\n"),
                    "choose another --json")
    for path in filter(None, (args.picture, args.json)):
        print(f"written: {path}")
    return 0


def _perplexity(args: argparse.Namespace) -> int:
    from hyena_dist.runtime.agree import agree
    from hyena_dist.tasks.score.perplexity import Request, facts_of_file, score_perplexity
    from hyena_dist.tasks.score.perplexity_report import draw, report
    from hyena_dist.tasks.score.tables import parts_of

    raise_interrupts()
    if args.block < 1:
        raise agreed(ConfigError(f"--block {args.block}: give how many bases a block has, at least 1"))
    trained, groups, window = _open(args, single_bases=False)
    request = Request(args.shards, args.split, window, args.block, args.regions)
    parts = agree(lambda: parts_of(args.out), groups)
    facts = agree(lambda: facts_of_file(trained, request), groups)
    found = score_perplexity(trained, request, facts, parts, groups)
    agree(lambda: None if found is None else
          _write(args.out, parts, [row.values() for row in found.rows],
                 {**facts, "blocks": found.blocks, "notes": found.notes},
                 lambda picture: report(found, facts, picture),
                 lambda path: draw(found, path, f"{facts['model']}, {args.split} of {args.shards}")), groups)
    return 0


def _distance(args: argparse.Namespace) -> int:
    from hyena_dist.data.reference import Region, read_reference
    from hyena_dist.data.variants import Variants
    from hyena_dist.runtime.agree import agree
    from hyena_dist.tasks.score.distance import Request, prepare, score_distance
    from hyena_dist.tasks.score.distance_report import draw, report
    from hyena_dist.tasks.score.tables import parts_of

    raise_interrupts()
    if args.most < 1:
        raise agreed(ConfigError(f"--most {args.most}: give how many windows are read, at least 1"))
    file = args.vcf or args.table
    if (file is None) != (args.fasta is None):
        raise agreed(ConfigError("variants need their reference: give --fasta with --vcf or --table, or neither"))
    if args.region is not None and args.fasta is None:
        raise agreed(ConfigError(f"--region {args.region}: says where the slice in --fasta lies: give --fasta, with "
                                 "--vcf or --table, or leave it out"))
    variants = reference = None
    if file is not None:
        variants = Variants(file, is_vcf=args.vcf is not None)
        reference = read_reference(args.fasta, None if args.region is None else Region.parse(args.region))
    trained, groups, window = _open(args, single_bases=True)
    request = Request(args.shards, args.split, window, args.most, variants, reference)
    parts = agree(lambda: parts_of(args.out), groups)
    facts, sites = agree(lambda: prepare(trained, request), groups)
    rows = score_distance(trained, request, facts, sites, parts, groups)
    agree(lambda: _write(args.out, parts, [vars(row) for row in rows], facts,
                         lambda picture: report(rows, facts, picture),
                         lambda path: draw(rows, path, f"{facts['model']}, windows of {window:,}"))
          if groups.world.rank == 0 else None, groups)
    return 0


def _substitutions(args: argparse.Namespace) -> int:
    from hyena_dist.data.tokenizer import tokenizer_of
    from hyena_dist.runtime.agree import agree
    from hyena_dist.tasks.score.substitutions import Request, facts_of_file, score_substitutions
    from hyena_dist.tasks.score.substitutions_report import draw, report
    from hyena_dist.tasks.score.tables import parts_of

    raise_interrupts()
    if find_spec("sklearn") is None:
        raise agreed(ConfigError("scikit-learn is missing, by which classifiers learn: install it with pip install "
                                 "'hyena-dist[tasks]'"))
    if args.every < 2 or args.most < 1:
        raise agreed(ConfigError(f"--every {args.every} --most {args.most}: change one base in 2 or more, of 1 window "
                                 "or more"))
    trained, groups, window = _open(args, single_bases=False)
    bases = tokenizer_of(trained.section).bases(window) if args.bases is None else args.bases
    request = Request(args.shards, args.split, bases, args.every, args.most)
    parts = agree(lambda: parts_of(args.out), groups)
    facts = agree(lambda: facts_of_file(trained, request), groups)
    rows = score_substitutions(trained, request, facts, parts, groups)
    agree(lambda: _write(args.out, parts, [row._asdict() for row in rows], facts,
                         lambda picture: report(rows, facts, picture),
                         lambda path: draw(rows, path, f"{facts['model']}, windows of {bases:,} bases"))
          if groups.world.rank == 0 else None, groups)
    return 0


def _write(out: Path, parts: "Parts", rows: list[dict[str, Any]], facts: dict[str, Any], text: Callable[[str], str],
           draw: Callable[[Path], None]) -> None:
    """Write a table, its text, and its picture where there is matplotlib; the parts go last."""
    from hyena_dist.runtime.files import write_durably, write_whole
    from hyena_dist.tasks.parts import ANOTHER
    from hyena_dist.tasks.score.tables import write_table

    picture, page = out.with_suffix(".png"), out.with_suffix(".md")
    drawn = find_spec("matplotlib") is not None
    if drawn:
        draw(picture)
    else:
        print("note: no picture is drawn: install matplotlib with pip install 'hyena-dist[plots]'", file=sys.stderr)
    write_whole(page, lambda aside: write_durably(aside, text(picture.name if drawn else "")), ANOTHER)
    write_table(out, rows, facts)
    parts.remove()
    print(page.read_text(encoding="utf-8"))
    print(f"written: {', '.join(map(str, [out, page, *([picture] if drawn else [])]))}")


def _print(found: "Sequence[Worth]") -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("group", "score", *(Column(name, justify="right", no_wrap=True) for name in
                                      ("variants", "positive", "AUROC", "AUPRC")))
    groups = list(dict.fromkeys(worth.group for worth in found))
    for group in groups:
        rows = [worth for worth in found if worth.group == group]
        for number, worth in enumerate(rows):
            table.add_row("" if number else group, f"{'-' if worth.sign < 0 else ''}{worth.score}",
                          f"{worth.variants:,}", f"{worth.positive:,}", *map(_area, (worth.auroc, worth.auprc)),
                          end_section=number == len(rows) - 1)
    console = Console()
    console.width = max(console.width, 90)
    console.print(table)
    if one_sided := [group for group in groups if any(worth.group == group and worth.auroc != worth.auroc
                                                      for worth in found)]:
        print(f"-: of {', '.join(one_sided)} there are no positive variants or no negative ones to tell apart")


def _area(value: float) -> str:
    return f"{value:.4f}" if value == value else "-"
