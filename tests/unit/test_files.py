from pathlib import Path

import pytest

from hyena_dist.config.errors import first_sentence, one_line
from hyena_dist.runtime.files import write_whole


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
