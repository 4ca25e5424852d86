"""Writers of the kinds of files that sequence comes in, each from its format's description."""

import json
import struct
from itertools import groupby
from pathlib import Path


def _spans(flags):
    """Starts and sizes of the stretches that are true."""
    found, place = [], 0
    for flag, run in groupby(flags):
        size = len(list(run))
        if flag:
            found.append((place, size))
        place += size
    return found


def two_bit(contigs, order="<", version=0):
    """A 2bit file of contigs without codes but N."""
    offset_kind = "Q" if version else "I"
    records = []
    for bases in contigs.values():
        record = struct.pack(order + "I", len(bases))
        for spans in (_spans(base in b"Nn" for base in bases), _spans(base > 96 for base in bases)):
            record += struct.pack(order + "I", len(spans))
            record += b"".join(struct.pack(order + "I", start) for start, _ in spans)
            record += b"".join(struct.pack(order + "I", size) for _, size in spans)
        record += struct.pack(order + "I", 0)
        codes = [b"TCAG".find(bytes([base]).upper()) % 4 for base in bases] + [0] * (-len(bases) % 4)
        record += bytes(codes[i] << 6 | codes[i + 1] << 4 | codes[i + 2] << 2 | codes[i + 3]
                        for i in range(0, len(codes), 4))
        records.append(record)
    place = 16 + sum(1 + len(name) + struct.calcsize(offset_kind) for name in contigs)
    index = b""
    for name, record in zip(contigs, records, strict=True):
        index += bytes([len(name)]) + name.encode() + struct.pack(order + offset_kind, place)
        place += len(record)
    return struct.pack(order + "4I", 0x1A412743, version, len(contigs), 0) + index + b"".join(records)


def genbank(contigs):
    """A GenBank flat file, a record for each contig, with its name as VERSION."""
    text = ""
    for number, (name, bases) in enumerate(contigs.items()):
        text += (f"LOCUS       L{number:<16}{len(bases):>11} bp    DNA     linear   PLN 21-JUN-1999\n"
                 f"DEFINITION  Made up,\n            in two lines.\nACCESSION   L{number}\nVERSION     {name}\n"
                 f"FEATURES             Location/Qualifiers\n     source          1..{len(bases)}\nORIGIN\n")
        letters = bases.decode()
        for start in range(0, len(letters), 60):
            line = letters[start : start + 60]
            text += f"{start + 1:>9} " + " ".join(line[i : i + 10] for i in range(0, len(line), 10)) + "\n"
        text += "//\n"
    return text.encode()


def json_lines(contigs):
    """As OpenGenome2's."""
    return "".join(json.dumps({"record": name, "text": bases.decode()}) + "\n"
                   for name, bases in contigs.items()).encode()


def parquet(contigs, path: Path):
    """Needs pyarrow."""
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.table({"record": list(contigs), "text": [bases.decode() for bases in contigs.values()],
                           "score": [0.5] * len(contigs)})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    return path.read_bytes()
