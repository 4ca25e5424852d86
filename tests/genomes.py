"""Made-up genomes with everything that a FASTA file may hold, and shards of them."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.splits import Splits


def sequence(rng: np.random.Generator, bases: int) -> bytes:
    """Random bases with stretches of N, of lower case, and other IUPAC codes."""
    codes = rng.choice(np.frombuffer(b"ACGT", dtype=np.uint8), bases)
    for _ in range(bases // 150):
        start, length = int(rng.integers(bases)), int(rng.integers(1, 40))
        codes[start : start + length] = ord("N")
    others = np.frombuffer(b"URYSWKMBDHV", dtype=np.uint8)
    scattered = rng.random(bases) < 0.005
    codes[scattered] = rng.choice(others, int(scattered.sum()))
    for _ in range(bases // 100):
        start, length = int(rng.integers(bases)), int(rng.integers(1, 60))
        codes[start : start + length] |= 0x20
    return codes.tobytes()


def genome(seed: int, *lengths: int) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {f"chr{i}": sequence(rng, length) for i, length in enumerate(lengths, 1)}


def fasta_text(contigs: dict[str, bytes], width: int = 60, line_end: bytes = b"\n") -> bytes:
    lines = []
    for name, bases in contigs.items():
        lines.append(b">" + name.encode() + b" some words")
        lines += [bases[i : i + width] for i in range(0, len(bases), width)]
    return line_end.join(lines) + line_end


def bgzip(data: bytes) -> bytes:
    """BGZF as htslib writes it: gzip members with their size in an extra field, and an empty one at the end."""
    members = []
    for start in [*range(0, len(data), 5000), len(data)]:
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        block = data[start : start + 5000]
        packed = packer.compress(block) + packer.flush()
        header = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + struct.pack("<H2sHH", 6, b"BC", 2, len(packed) + 25)
        members.append(header + packed + struct.pack("<II", zlib.crc32(block), len(block)))
    return b"".join(members)


def write_fasta(path: Path, contigs: dict[str, bytes]) -> Path:
    text = fasta_text(contigs)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def shards(directory: Path, contigs: dict[str, bytes], splits: Splits | None = None, segment_bases: int = 700,
           shard_bases: int = 2500) -> Manifest:
    """Shards of small segments, so that windows cross them."""
    source = Source(write_fasta(directory / "genome.fa", contigs))
    return build([source], directory / "shards", splits or Splits(), segment_bases=segment_bases,
                 shard_bases=shard_bases)
