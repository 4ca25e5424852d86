"""What numbers become in files of results: text in columns, and JSON."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.config.plain import finite, read_object
from hyena_dist.tasks.columns import text_of, write_columns


def test_what_is_not_known_is_an_empty_cell(tmp_path: Path) -> None:
    number = float(np.float32(1 / 3))
    assert [text_of(value) for value in (None, math.nan, 7, "a b", 1e6, -math.inf)] == ["", "", "7", "a b", "1000000",
                                                                                       "-inf"]
    assert np.float32(text_of(number)) == np.float32(number), "nine digits give float32 back"
    out = tmp_path / "x.tsv"
    rows = {"name": ["a", None], "score": np.array([0.5, np.nan])}
    write_columns(out, ".tsv", {"seeds": [0, 1], "model": "m"}, [rows])
    assert out.read_text() == "##hyena_dist.seeds=[0, 1]\n##hyena_dist.model=m\nname\tscore\na\t0.5\n\t\n"


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    values = {"loss": math.nan, "by": [{"name": "inf", "value": -math.inf}, 0.5, 3], "none": None}
    (tmp_path / "values.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="NaN is no number of JSON"):
        read_object(tmp_path / "values.json")
    (tmp_path / "values.json").write_text(json.dumps(finite(values)))
    assert read_object(tmp_path / "values.json") == {"loss": None, "by": [{"name": "inf", "value": None}, 0.5, 3],
                                                     "none": None}
