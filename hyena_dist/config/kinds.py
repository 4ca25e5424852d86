"""What a file is, by its first bytes, where it is not what a reader wants: its kind, and the command that makes of it
what is wanted. Names of files say nothing here.
"""

import shlex
from typing import NamedTuple

START_BYTES = 512
"""Of a file, to know its kind by."""
UTF8_MARK = b"\xef\xbb\xbf"
"""With which some editors begin a file; YAML allows it."""


class Kind(NamedTuple):
    """A kind of file that no reader of this project takes."""

    name: str
    """As in "is NAME"."""
    command: str = ""
    """What converts it, with FILE for the file and TEXT for what it makes of it."""
    remedy: str = ""
    """What to do where the file only stands in for another one, so that there is nothing to convert."""


_LFS = Kind("a git-lfs pointer to the file and not the file itself", remedy="run `git lfs pull` in its directory")
_ANNEX = Kind("a git-annex pointer to the file and not the file itself", remedy="run `git annex get` on it")
_PAGE = Kind("a web page and not the file itself", remedy="download the file itself")


_SIGNS: tuple[tuple[bytes, Kind], ...] = (
    (b"\xff\xfe\x00\x00", Kind("text in UTF-32", "iconv -f UTF-32 -t UTF-8 FILE > TEXT")),
    (b"\x00\x00\xfe\xff", Kind("text in UTF-32", "iconv -f UTF-32 -t UTF-8 FILE > TEXT")),
    (b"\xff\xfe", Kind("text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > TEXT")),
    (b"\xfe\xff", Kind("text in UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > TEXT")),
    (UTF8_MARK, Kind("text behind a byte order mark (BOM)", "tail -c +4 FILE > TEXT")),
    (b"PK\x03\x04", Kind("a zip archive", "unzip -p FILE > TEXT")),
    (b"PK\x05\x06", Kind("an empty zip archive", "unzip -l FILE")),
    (b"\xfd7zXZ\x00", Kind("compressed by xz", "xz -dc FILE > TEXT")),
    (b"\x28\xb5\x2f\xfd", Kind("compressed by zstd", "zstd -dc FILE > TEXT")),
    (b"BZh", Kind("compressed by bzip2", "bzip2 -dc FILE > TEXT")),
    (b"\x04\x22\x4d\x18", Kind("compressed by lz4", "lz4 -dc FILE > TEXT")),
    (b"LZIP", Kind("compressed by lzip", "lzip -dc FILE > TEXT")),
    (b"\x5d\x00\x00", Kind("compressed by lzma", "xz --format=lzma -dc FILE > TEXT")),
    (b"\x1f\x9d", Kind("compressed by compress", "gzip -dc FILE > TEXT")),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", "7z x -so FILE > TEXT")),
    (b"Rar!", Kind("a rar archive", "unrar p -inul FILE > TEXT")),
    (b"\x43\x27\x41\x1a", Kind("UCSC's 2bit", "twoBitToFa FILE TEXT")),
    (b"\x1a\x41\x27\x43", Kind("UCSC's 2bit", "twoBitToFa FILE TEXT")),
    (b"CRAM", Kind("CRAM", "samtools fasta FILE > TEXT")),
    (b"BAM\x01", Kind("BAM", "samtools fasta FILE > TEXT")),
    (b"BCF\x02", Kind("BCF, which holds variants", "bcftools consensus -f REFERENCE FILE > TEXT")),
    (b"##fileformat=VCF", Kind("VCF, which holds variants", "bcftools consensus -f REFERENCE FILE > TEXT")),
    (b"@HD\t", Kind("SAM", "samtools fasta FILE > TEXT")),
    (b"@SQ\t", Kind("SAM", "samtools fasta FILE > TEXT")),
    (b"@", Kind("FASTQ", "seqtk seq -A FILE > TEXT")),
    (b"LOCUS ", Kind("GenBank", "seqret -sequence FILE -outseq fasta:TEXT")),
    (b"ID   ", Kind("EMBL", "seqret -sequence FILE -outseq fasta:TEXT")),
    (b"version https://git-lfs", _LFS),
    (b"/annex/objects/", _ANNEX),
    (b"\x1f\x8b", Kind("compressed by gzip twice", "gzip -dc FILE > TEXT")),
)
_NO_MARK = Kind("text in UTF-16 without a mark", "iconv -f {} -t UTF-8 FILE > TEXT")
_PAGES = (b"<!doctype html", b"<html")
"""How a web page begins, in lower case and without the spaces before it."""
_TAR = Kind("a tar archive", "tar -xOf FILE > TEXT")
_GZIP = Kind("compressed by gzip", "gzip -dc FILE > TEXT")


_TEXT = b"\t\n\r" + bytes(range(32, 127))
_FILTERS = frozenset({"iconv", "tail", "xz", "zstd", "bzip2", "lz4", "lzip", "gzip"})
"""Read a pipe, too."""
_READ_GZIP = frozenset({"samtools", "bcftools", "seqtk", "tar"})


def kind_of(start: bytes) -> Kind | None:
    """The kind of a file, or of what a gzip file holds, that begins with these `START_BYTES`; None: none that is known
    here. A file that gzip made is for its reader to know."""
    if start[257:262] == b"ustar":
        return _TAR
    if start[:1] in (b">", b"#") and start[1:2] == b"\0":
        return _NO_MARK._replace(command=_NO_MARK.command.format("UTF-16LE"))
    if start[:1] == b"\0" and start[1:2] in (b">", b"#"):
        return _NO_MARK._replace(command=_NO_MARK.command.format("UTF-16BE"))
    if start.lstrip().lower().startswith(_PAGES):
        return _PAGE
    return next((kind for sign, kind in _SIGNS if start.startswith(sign)), None)


def kind_of_text(start: bytes) -> Kind | None:
    """As `kind_of`, for readers that take any text that does not stand in for another file, and not even gzip."""
    if not start.translate(None, _TEXT):
        return _stand_in(start)
    return _GZIP if start.startswith(b"\x1f\x8b") else kind_of(start)


def kind_of_weights(start: bytes) -> Kind | None:
    """As `kind_of`, for readers of tensors, which take neither text nor gzip. Zip archives are for them to know: torch
    writes such."""
    if len(start) > 8 and not start.translate(None, _TEXT):
        return _stand_in(start) or Kind(f"text that begins with {start[:40].decode()!r}, and no file of weights",
                                        remedy="fetch that file again")
    if start.startswith((b"PK", b"@")):
        return None
    return _GZIP if start.startswith(b"\x1f\x8b") else kind_of(start)


def _stand_in(start: bytes) -> Kind | None:
    kind = kind_of(start)
    return kind if kind and kind.remedy else None


def inside_gzip(kind: Kind) -> Kind:
    """The kind of a file that gzip made, with something of this kind in it."""
    if kind.remedy:
        return kind._replace(name=f"{kind.name}, inside gzip")
    tool, command = kind.command.split()[0], kind.command
    if tool in _FILTERS:
        command = f"gzip -dc FILE | {command.replace(' FILE', '')}"
    elif tool not in _READ_GZIP:
        command = f"gzip -dc FILE > unpacked && {command.replace('FILE', 'unpacked')}"
    return Kind(f"{kind.name}, inside gzip", command)


def not_as_it_is(kind: Kind, path: object, text: str) -> str:
    """One line on a file at `path` of this kind: what it is, and how to make of it the file `text`."""
    if kind.remedy:
        return f"{path}: is {kind.name}: {kind.remedy}"
    command = kind.command.replace("FILE", shlex.quote(str(path))).replace("TEXT", text)
    return f"{path}: is {kind.name}: convert it with `{command}`, and give what that makes"
