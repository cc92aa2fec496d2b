"""The lines of Python that the README shows."""

import pathlib
import re

import numpy as np
import pytest
import runs
import tiny


@pytest.mark.slow
def test_the_lines_from_python(tmp_path):
    config = tiny.config(tiny.corpus(tmp_path / "data"))
    config.model.max_length = 256
    config.steps = 4
    runs.run(config, tmp_path / "run")
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    [lines] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert lines.count("runs/smoke") == 1
    user = {}
    exec(lines.replace("runs/smoke", str(tmp_path / "run")), user)
    rows, length = user["tokens_BT"].shape
    assert user["logits_BTV"].shape == (rows, length, tiny.VOCAB)
    assert np.isfinite(user["logits_BTV"]).all() and np.std(user["logits_BTV"]) > 0
    assert isinstance(user["text"], str) and user["text"]
