import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hyena_dist.config.errors import UserError, first_sentence, one_line, read_remedy, write_remedy
from hyena_dist.config.load import read_config
from hyena_dist.data.index import read_index
from hyena_dist.data.sources import reader_of
from hyena_dist.data.splits import BedSplits
from hyena_dist.runtime.files import write_whole, writing


def test_any_message_is_one_line() -> None:
    error = ValueError("a  b\n\tc. Trust\nthe file.")
    assert (one_line(error), first_sentence(error)) == ("a b c. Trust the file.", "a b c")
    assert (one_line(OSError()), first_sentence(OSError())) == ("OSError", "OSError")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, lambda aside: aside.write_text("old"))

    def fail(aside: Path) -> None:
        aside.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"summary.json: could not be written \(No space left on device\): make room"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENOSPC, "make room there or change train.run_dir"),
    (errno.EDQUOT, "make room there or change train.run_dir"),
    (errno.EACCES, "get permission to write there or change train.run_dir"),
    (errno.EPERM, "get permission to write there or change train.run_dir"),
    (errno.EFBIG, ".*ulimit -f.* or change train.run_dir"),
    (errno.EIO, ".*disk or file server looked at or change train.run_dir"),
    (errno.ESTALE, ".*disk or file server looked at or change train.run_dir"),
    (errno.EROFS, "change train.run_dir"),
    (errno.ENAMETOOLONG, "change train.run_dir"),
])
def test_the_remedy_of_a_failed_write_is_that_of_its_kind(number: int, remedy: str) -> None:
    with pytest.raises(OSError, match=f"^x: could not be written .{os.strerror(number)}.: {remedy}$"), \
            writing(Path("x")):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.EACCES, "get permission to read it"), (errno.EIO, "have its disk or file server looked at"),
    (errno.EMFILE, "raise the limit on open files (`ulimit -n`)"), (errno.ENOENT, "give another"),
])
def test_the_remedy_of_a_failed_read_is_that_of_its_kind(number: int, remedy: str) -> None:
    assert read_remedy(OSError(number, os.strerror(number)), "give another") == remedy
    assert read_remedy(ValueError("no such number"), "give another") == "give another"


@pytest.mark.parametrize("read", [
    lambda path: read_index(path), lambda path: BedSplits(path), lambda path: reader_of(path),
    lambda path: read_config(path),
], ids=["shards.json", "BED", "FASTA", "YAML"])
def test_a_file_that_may_not_be_read_says_so(read: Callable[[Path], object], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as root, who may: by what the system answers."""
    def refuse(path: object, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with pytest.raises(UserError) as absent:
        read(tmp_path / "file")
    assert "permission" not in str(absent.value)
    monkeypatch.setattr("hyena_dist.config.plain.os.open", refuse)
    with pytest.raises(UserError, match="Permission denied.*get permission to read it$"):
        read(tmp_path / "file")


def test_the_kind_of_a_wrapped_error_is_found_in_its_text() -> None:
    """As torch's writer of checkpoints gives it."""
    wrapped = RuntimeError("rank 1: [Errno 13] Permission denied: 'a'")
    assert write_remedy(wrapped, "go elsewhere") == "get permission to write there or go elsewhere"
    assert write_remedy(RuntimeError("something else"), "go elsewhere") == "go elsewhere"
