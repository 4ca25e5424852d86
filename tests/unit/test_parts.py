"""What a killed call leaves of a long task: what counts as a part, and what is said where its facts are damaged."""

from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from hyena_dist.config.errors import ConfigError
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.parts import Parts
from tests.dist.harness import fork_server


def begun(tmp_path: Path) -> Parts:
    parts = Parts(tmp_path / "out.npy")
    parts.begin({"window": 5}, Groups.single())
    return parts


def test_what_was_being_written_is_no_part(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    (parts.path / "00000000.tmp.npz").write_bytes(b"half")
    parts.begin({"window": 6}, Groups.single())
    assert not parts.has_any
    parts.save("00000000", scores=np.zeros(1))
    assert parts.has_any
    parts.begin({"window": 6}, Groups.single())
    with pytest.raises(ConfigError, match="was begun with another window: go on as it was begun, or remove it"):
        parts.begin({"window": 5}, Groups.single())


def test_a_part_of_another_machine_may_be_seen_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one that never comes."""
    monkeypatch.setattr("hyena_dist.tasks.parts._SEEN_SECONDS", 1.0)
    parts = begun(tmp_path)
    with pytest.raises(ConfigError, match="00000000.npz: is not there: ranks on several machines need --out on a file"):
        parts.need("00000000")
    later = Timer(0.5, lambda: parts.save("00000000", scores=np.ones(3)))
    later.start()
    assert parts.need("00000000")["scores"].tolist() == [1, 1, 1]
    later.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_damaged_facts_are_one_line_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    parts = begun(tmp_path)
    parts.save("00000000", scores=np.zeros(1))
    (parts.path / "facts.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"facts.json: cannot be read \(.*\): remove .*out.npy.parts to begin anew"):
        parts.begin({"window": 5}, Groups.single())


def _begin(out: str) -> None:
    try:
        Parts(Path(out)).begin({"window": 5}, Groups.single())
        said = "begun"
    except ConfigError as error:
        said = str(error)
    Path(out).with_name("said").write_text(said)


def _of_another(out: Path) -> str:
    process = fork_server().Process(target=_begin, args=(str(out),))
    process.start()
    process.join()
    return out.with_name("said").read_text()


def test_two_calls_do_not_write_the_same_parts(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    said = _of_another(tmp_path / "out.npy")
    assert said.startswith(f"{parts.path}: another call is writing these parts (host ")
    assert said.endswith("wait for its end, stop it, or choose another --out")
    parts.remove()
    assert _of_another(tmp_path / "out.npy") == "begun"
