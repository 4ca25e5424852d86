"""What a killed call leaves of a long task: what counts as a part, and what is said where its facts are damaged."""

from pathlib import Path

import numpy as np
import pytest

from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.parts import Parts


def begun(tmp_path: Path) -> Parts:
    parts = Parts(tmp_path / "out.npy")
    parts.begin({"window": 5})
    return parts


def test_what_was_being_written_is_no_part(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    (parts.path / "00000000.tmp.npz").write_bytes(b"half")
    parts.begin({"window": 6})
    assert not parts.has_any
    parts.save("00000000", scores=np.zeros(1))
    assert parts.has_any
    parts.begin({"window": 6})
    with pytest.raises(ConfigError, match="was begun with another window: go on as it was begun, or remove it"):
        parts.begin({"window": 5})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_damaged_facts_are_one_line_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    parts = begun(tmp_path)
    parts.save("00000000", scores=np.zeros(1))
    (parts.path / "facts.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"facts.json: cannot be read \(.*\): remove .*out.npy.parts to begin anew"):
        parts.begin({"window": 5})
