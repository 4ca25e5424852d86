"""What a build says of its input, and which splits it refuses. Each refusal has a control that passes."""

import re
import time

import numpy as np
import pytest

from hyena_dist.cli.build import main as build_command
from hyena_dist.data import copies, sketch
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.copies import Samples
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.measure import strands
from hyena_dist.data.sketch import look
from hyena_dist.data.splits import BedSplits, ContigSplits, FractionSplits, Splits, Stretch
from hyena_dist.data.stream import TrainStream
from hyena_dist.data.tokenizer import encode
from hyena_dist.data.twins import Twins
from hyena_dist.data.verify import verify
from tests.genomes import genome, write_fasta

ONE, TWO = (contigs["chr1"].upper() for contigs in (genome(1, 3000), genome(2, 2000)))
COMPLEMENT = bytes.maketrans(b"ACGTRYKMBDHV", b"TGCAYRMKVHDB")
LOWER = bytes.maketrans(b"acgtrykmbdhv", b"tgcayrmkvhdb")


def run(tmp_path, capsys, contigs, *arguments):
    """Status, output and error line of a build, the same with --dry-run."""
    fasta = write_fasta(tmp_path / "a.fa", contigs)
    ends = []
    for extra in (["--dry-run"], []):
        status = build_command([str(fasta), "--out", str(tmp_path / "out"), *arguments, *extra])
        captured = capsys.readouterr()
        notes = [line for line in captured.out.splitlines() if line.startswith("note: ")]
        ends.append((status, notes, captured.err))
    assert ends[0] == ends[1]
    assert captured.err.count("\n") == (status == 2)
    assert (tmp_path / "out").exists() == (status == 0)
    return status, "\n".join(notes), captured.err, captured.out


def plain(bases, seed=0):
    return np.random.default_rng(seed).choice(np.frombuffer(b"ACGT", np.uint8), bases).tobytes()


def test_what_is_odd_is_counted_and_said(tmp_path, capsys):
    contigs = {"good": plain(900).lower(), "gap": b"N" * 60 + b"ACGT" * 10, "mixed": b"ACGTU" * 8 + b"R",
               "rna": b"ACGUacgu" * 7, "short": b"A"}
    status, notes, _, out = run(tmp_path, capsys, contigs)
    assert status == 0
    assert notes.splitlines() == [
        "note: RNA: 1 contig with U and no T, first rna: 14 U are stored as T",
        "note: U in DNA: 1 contig with T and U, first mixed: 8 U read as [UNK] and are not scored",
        "note: more than half N: 1 contig, first gap, 100 bases",
        "note: more than half lower case (soft-masked): 1 contig, first good, 900 bases; read as upper case",
        "note: a single base: 1 contig, first short: without a next base there is no window",
        "note: at most 1,024 bases: 4 contigs, first good, 1,097 bases; where windows are longer, data.pack=true "
        "lets them share some"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert rows[0] == ["a", "a", "5", "900", "1,098", "50.0 %", "5.5 %", "84.5 %", "9"]
    assert rows[1] == ["train", "1,098", "50.0 %", "5.5 %", "84.5 %", "9", rows[1][6], "0", "-"]
    assert [row[:2] for row in rows[2:]] == [["val", "0"], ["test", "0"]]
    assert run(tmp_path / "x" if (tmp_path / "x").mkdir() else tmp_path / "x", capsys, {"good": plain(1100)})[1] == ""


def test_rna_is_stored_as_its_dna(tmp_path):
    """The tokens have no U; DNA with a stray U keeps it."""
    rna = ONE.replace(b"U", b"A").replace(b"T", b"U")
    path = write_fasta(tmp_path / "a.fa", {"rna": rna, "dna": b"ACGTU" * 9})
    manifest = build([Source(path)], tmp_path / "out", Splits())
    assert manifest.read_sample(0).tobytes() == rna.replace(b"U", b"T") + b"ACGTU" * 9
    assert np.array_equal(manifest.read("rna", 0, 3000), encode(rna.replace(b"U", b"T")))
    verify(manifest.directory, [Source(path)])


@pytest.mark.parametrize("text", [b"N" * 900, b"A" + b"N" * 900, b"RYSW" * 90, b"A"])
def test_nothing_to_score_is_refused(tmp_path, capsys, text):
    status, _, error, _ = run(tmp_path, capsys, {"a": text})
    assert status == 2
    assert "no base of these files can be scored" in error


def test_training_on_nothing_to_score_is_refused(tmp_path):
    """Where the set as a whole has bases: the validation split has. The control: one base in the last window."""
    train = bytearray(b"N" * 200_000)
    path = write_fasta(tmp_path / "a.fa", {"train": bytes(train), "val": ONE})
    directory = build([Source(path)], tmp_path / "out", ContigSplits(["val"])).directory
    with pytest.raises(DataError, match="out has no training base to score"):
        TrainStream(Manifest.load(directory), seq_len=100, seed=0)
    train[-1:] = b"A"
    write_fasta(path, {"train": bytes(train), "val": ONE})
    TrainStream(build([Source(path)], tmp_path / "new", ContigSplits(["val"])), seq_len=100, seed=0)


def test_splits_without_a_base_to_score_are_refused(tmp_path, capsys):
    contigs = {"one": ONE, "two": TWO, "gap": b"N" * 500, "x": b"A"}
    bed = tmp_path / "a.bed"
    bed.write_text("one 0 2000 train\ngap 0 500 val\n")
    for arguments, split in ((("--val-fraction", "0.0001"), "val"), (("--val-fraction", "0.0003"), "val"),
                             (("--val-fraction", "0.99999"), "train"), (("--val-contigs", "gap"), "val"),
                             (("--val-contigs", "x"), "val"), (("--bed", str(bed)), "val")):
        status, _, error, _ = run(tmp_path, capsys, contigs, *arguments)
        assert status == 2, arguments
        assert f": no base of split {split} can be scored" in error
        assert (arguments[1] if "--bed" in arguments else arguments[0]) in error
    bed.write_text("one 0 2000 train\none 2000 3000 val\n")
    assert run(tmp_path, capsys, contigs, "--bed", str(bed))[0] == 0


def test_contigs_too_short_for_the_fraction_are_said(tmp_path, capsys):
    status, notes, _, _ = run(tmp_path, capsys, {"one": ONE, "s1": plain(40), "s2": plain(30, 1)}, "--val-fraction",
                              "0.01")
    assert status == 0
    assert "nothing held out: 2 contigs, first s1, 70 bases" in notes


@pytest.mark.parametrize("strand", [lambda text: text, bytes.lower, lambda text: text.translate(COMPLEMENT)[::-1]],
                         ids=["same", "other case", "other strand"])
def test_a_sequence_that_is_held_out_and_trains_is_refused(tmp_path, capsys, strand):
    """Under another name, with whole contigs and with a part of each. Controls: another sequence; both held out."""
    contigs = {"one": ONE, "two": TWO, "copy": strand(ONE)}
    for arguments in (("--val-contigs", "copy"), ("--val-contigs", "one"), ("--val-fraction", "0.1")):
        status, _, error, _ = run(tmp_path, capsys, contigs, *arguments)
        assert status == 2
        assert "'one' and 'copy' are the same sequence, and what is held out of one trains in the other" in error
    bed = tmp_path / "a.bed"
    bed.write_text("one 0 1000 val\none 1000 3000 train\ncopy 0 3000 train\n")
    assert run(tmp_path, capsys, contigs, "--bed", str(bed))[0] == 2
    status, notes, _, _ = run(tmp_path, capsys, contigs, "--val-contigs", "one,copy")
    assert status == 0
    assert "the same sequence twice: 1 contig, first copy and one, 3,000 bases" in notes


def test_a_small_leak_is_refused_and_said_where_it_is_allowed(tmp_path, capsys):
    contigs = {"one": ONE, "two": TWO, "s1": plain(200), "s2": plain(200)}
    status, _, error, _ = run(tmp_path, capsys, contigs, "--val-contigs", "one,s1")
    assert status == 2
    assert "'s1' and 's2' are the same sequence" in error
    status, notes, _, _ = run(tmp_path, capsys, contigs, "--val-contigs", "one,s1", "--allow-copies", "1")
    assert status == 0
    assert "200 held-out bases also train, under another name" in notes
    assert "also train" not in run(tmp_path / "x" if (tmp_path / "x").mkdir() else tmp_path / "x", capsys, contigs,
                                   "--val-contigs", "one")[1]


@pytest.mark.parametrize("mirrored", [False, True])
def test_stretches_of_the_other_strand_are_compared_where_they_lie(tmp_path, mirrored):
    """The same part held out of both, on whichever strand, is no leak."""
    copy = ONE.translate(COMPLEMENT)[::-1] if mirrored else ONE
    bed = tmp_path / "a.bed"
    bed.write_text("one 0 1000 val\none 1000 3000 train\n"
                   + ("copy 0 2000 train\ncopy 2000 3000 val\n" if mirrored else
                      "copy 0 1000 val\ncopy 1000 3000 train\n"))
    path = write_fasta(tmp_path / "a.fa", {"one": ONE, "copy": copy})
    build([Source(path)], tmp_path / "out", BedSplits(bed))


@pytest.mark.parametrize("unused", ["", "b 0 100 val\n"])
def test_a_leak_is_seen_behind_a_twin_that_is_in_no_split(tmp_path, capsys, unused):
    """The control: both held out."""
    contigs = {"a": ONE, "b": ONE, "c": ONE.translate(COMPLEMENT)[::-1], "x": TWO}
    bed = tmp_path / "a.bed"
    bed.write_text("b 0 3000 val\nc 0 3000 train\nx 0 2000 train\n")
    status, _, error, _ = run(tmp_path, capsys, contigs, "--bed", str(bed))
    assert status == 2
    assert "'b' and 'c' are the same sequence" in error
    assert "of 3,000 held-out bases 3,000 train so" in error
    bed.write_text("b 0 3000 val\nc 0 3000 val\nx 0 2000 train\n" + unused)
    assert run(tmp_path, capsys, contigs, "--bed", str(bed))[0] == 0


def test_a_held_out_base_counts_once_however_many_copies_train(tmp_path, capsys):
    """A repeat of 500 bases."""
    repeats = {f"r{number}": plain(500, 3) for number in range(21)}
    contigs = {**repeats, "big": plain(50_000, 1), "small": plain(1000, 2), "rest": TWO}
    status, notes, _, _ = run(tmp_path, capsys, contigs, "--val-contigs", "big,r0", "--allow-copies", "1")
    assert status == 0
    assert "note: 500 held-out bases also train, under another name" in notes
    (tmp_path / "x").mkdir()
    status, _, error, _ = run(tmp_path / "x", capsys, contigs, "--val-contigs", "small,r7,r0")
    assert status == 2
    assert "'r0' and 'r1' are the same sequence" in error
    assert "of 2,000 held-out bases 1,000 train so" in error


def stretches(rng, bases, count):
    """That many stretches in order, of any split, with gaps between some."""
    cuts = np.sort(rng.choice(bases, 2 * count, replace=False))
    return [Stretch(start, end, ("train", "val", "test")[rng.integers(3)])
            for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True) if rng.random() < 0.8]


def test_leaks_are_those_counted_base_by_base():
    rng = np.random.default_rng(0)
    text = np.frombuffer(plain(300), np.uint8)
    other_strand = np.frombuffer(text.tobytes().translate(COMPLEMENT)[::-1], np.uint8)
    seen = 0
    for _ in range(50):
        twins, marks = Twins(), []
        for number in range(4):
            mirrored, rows = bool(rng.integers(2)), stretches(rng, 300, int(rng.integers(1, 30)))
            twins.add(str(number), 300, strands(other_strand if mirrored else text), rows)
            mark = np.zeros(300, int)
            for start, end, split in rows:
                mark[start:end] = 1 if split == "train" else 2
            marks.append(mark[::-1] if mirrored else mark)
        trains = np.any([mark == 1 for mark in marks], axis=0)
        expected = sum(int((trains & (mark == 2)).sum()) for mark in marks)
        seen += expected
        leak = twins.leak()
        assert leak.bases == expected
        one, other = marks[int(leak.one)], marks[int(leak.other)]
        assert leak.one < leak.other
        assert ((one == 1) & (other == 2) | (one == 2) & (other == 1)).any()
    assert seen > 1000


def test_many_stretches_of_twins_are_compared_in_seconds():
    """100,000 rows of each, which each with each would be 10^10 pairs."""
    text, twins = np.frombuffer(plain(200_000), np.uint8), Twins()
    for name, (odd, even) in {"a": ("val", "train"), "b": ("train", "val")}.items():
        twins.add(name, text.size, strands(text), [
            Stretch(at, at + 2, odd if at % 4 else even) for at in range(0, 200_000, 2)])
    start = time.process_time()
    assert twins.leak() == (200_000, "a", "b")
    assert time.process_time() - start < 10


def mutated(text, share, seed=0):
    """With this share of its bases changed, and one taken out near the front."""
    rng, bases = np.random.default_rng(seed), np.frombuffer(text, np.uint8).copy()
    places = rng.random(bases.size) < share
    bases[places] = rng.choice(np.frombuffer(b"ACGT", np.uint8), int(places.sum()))
    return np.delete(bases, 100).tobytes()


def test_another_assembly_of_what_is_held_out_is_said(tmp_path, capsys):
    """Neither the same bases nor the same places, and no stretch of hundreds the same. The control: genomes that share
    nothing."""
    text = plain(60_000)
    near, far = mutated(text, 0.043), plain(60_000, 1)
    for name, other, said in (("near", near, True), ("strand", near.translate(COMPLEMENT)[::-1], True),
                              ("far", far, False)):
        (tmp_path / name).mkdir()
        status, notes, _, _ = run(tmp_path / name, capsys, {"one": text, "other": other, "x": plain(90_000, 2)},
                                  "--val-contigs", "one")
        assert status == 0
        assert ("of what is held out, by 32-mers, also trains" in notes) == said


@pytest.mark.parametrize("strand", [lambda text: text, lambda text: text.lower().translate(LOWER)[::-1]],
                         ids=["same", "other"])
def test_a_copied_stretch_is_refused_across_splits(tmp_path, capsys, strand):
    """1,200 bases inside others, at another place and on either strand; refused with both places, or said where it is
    allowed. The controls: in one split, and other bases in their place."""
    one, two = plain(3000, 1), plain(2000, 2)
    held, trains = two[:900] + strand(one[500:1700]) + two[900:], plain(5000, 7) + one
    status, _, error, _ = run(tmp_path, capsys, {"held": held, "trains": trains}, "--val-contigs", "held")
    assert status == 2
    found = re.search(r"held-out sequence also trains, .*: (\d+) of (\d+) sampled windows of 256 bases .*, the "
                      r"first at held:([\d,]+), which is at trains:([\d,]+) too; .*--allow-copies", error)
    place, other = (int(found[group].replace(",", "")) for group in (3, 4))
    assert 900 < place <= 900 + 1200 - 256 + 1
    assert held[place - 1 : place + 255].upper() in (
        trains[other - 1 : other + 255], trains[other - 1 : other + 255].translate(COMPLEMENT)[::-1])
    status, notes, _, _ = run(tmp_path, capsys, {"held": held, "trains": trains}, "--val-contigs", "held",
                              "--allow-copies", "1")
    assert status == 0
    assert f"note: {found[1]} of {found[2]} held-out windows of 256 bases, sampled, also train" in notes
    for number, (contigs, arguments) in enumerate((
            ({"held": held, "trains": trains}, ()),
            ({"held": two[:900] + plain(1200, 8) + two[900:], "trains": trains}, ("--val-contigs", "held")))):
        (tmp_path / str(number)).mkdir()
        assert run(tmp_path / str(number), capsys, contigs, *arguments)[0] == 0


def windows_of(texts):
    """Places of all copies of windows, by their text on the first strand in order, from every place that is sampled."""
    found = {}
    for name, text in texts.items():
        for place in look(np.frombuffer(text, np.uint8)).places.tolist():
            window = text[place : place + 256].upper()
            found.setdefault(min(window, window.translate(COMPLEMENT)[::-1]), []).append((name, place))
    return found


def test_windows_are_equal_where_their_bases_are(monkeypatch):
    """Whatever the batches, hashes are equal for the same 256 bases of either strand, and differ for all others."""
    text = plain(30_000).replace(b"ACGTA", b"ACNTA")
    bases = np.frombuffer(text + text[::-1].translate(COMPLEMENT) + text[100:9000], np.uint8)
    found = look(bases)
    assert 300 < found.places.size < 1500
    by_text = windows_of({"all": bases.tobytes()})
    by_hash = {}
    for place, number in zip(found.places.tolist(), found.windows.tolist(), strict=True):
        by_hash.setdefault(number, []).append(("all", place))
    assert sorted(by_hash.values()) == sorted(by_text.values())
    monkeypatch.setattr(sketch, "_BATCH", 1000)
    for one, two in zip(found, look(bases), strict=True):
        assert np.array_equal(np.sort(one), np.sort(two))


def test_samples_of_many_bases_are_thinned_alike_everywhere(monkeypatch):
    """Memory is bounded, and copies are still found, by fewer samples; the shares stay what they are."""
    monkeypatch.setattr(copies, "MOST", 1000)
    taken = Samples()
    for number in range(8):
        found = look(np.frombuffer(plain(60_000, number % 7), np.uint8))
        words = [found.words, found.words[:0]]
        taken.add(*words[:: 1 if number < 7 else -1], found.windows,
                  (found.places + 60_000 * number) * 4 + (number == 7))
    result, shared = taken.copies(), taken.shared()
    assert result.one_in > 64
    assert sum(result.windows.values()) <= 500
    assert result.across["val"] == result.windows["val"] > 10
    assert shared.trained == shared.held_out > 2


def test_samples_are_those_of_both_strands_and_of_any_place():
    text = np.frombuffer(plain(100_000), np.uint8)
    found = look(text).words
    print(f"{found.size} samples of {text.size} bases")
    assert 150 < found.size < 700
    other = np.frombuffer(text.tobytes().translate(COMPLEMENT)[::-1], np.uint8)
    assert sorted(look(other).words) == sorted(found)
    assert set(look(text[777:]).words) <= set(found)
    words = {text[i : i + 32].tobytes() for i in range(text.size - 31)}
    words |= {other[i : i + 32].tobytes() for i in range(text.size - 31)}
    for sample in found.tolist():
        assert bytes(b"ACGT"[sample >> 2 * i & 3] for i in range(31, -1, -1)) in words
    assert look(np.frombuffer(b"ACGTN" * 1000, np.uint8)).words.size == 0
    assert look(text[:5]).words.size == 0


def test_one_species_from_several_files_is_said(tmp_path, capsys):
    paths = [write_fasta(tmp_path / f"{name}.fa", {name: text}) for name, text in (("a", ONE), ("b", TWO))]
    for labels, said in ((("mouse", "mouse"), True), (("mouse", "rat"), False)):
        arguments = [f"{label}={path}" for label, path in zip(labels, paths, strict=True)]
        assert build_command([*arguments, "--out", str(tmp_path / labels[1]), "--val-contigs", "mouse.a"]) == 0
        assert ("species 'mouse' comes from 2 files" in " ".join(capsys.readouterr().out.split())) == said


def test_the_fraction_that_rounds_to_nothing_is_refused_by_the_function_too(tmp_path):
    path = write_fasta(tmp_path / "a.fa", {"a": plain(40)})
    with pytest.raises(DataError, match="--val-fraction 0.01: no base of split val"):
        build([Source(path)], tmp_path / "out", FractionSplits(0.01))
    assert not (tmp_path / "out").exists()
