"""`make run` as a user types it: its parts are there and its quality is what it was."""

import json
import platform
from pathlib import Path

import pytest

from benchmarks import smoke

STORED = Path(__file__).parent / "smoke_bits_per_byte.json"


@pytest.mark.slow
def test_make_run(tmp_path):
    smoke.run(tmp_path)
    for name in ("report.html", "hf/model.safetensors", "hf/tokenizer.json", "metrics.jsonl"):
        assert (tmp_path / "run" / name).exists()
    found = smoke.bits_per_byte(tmp_path)
    # Its text is the library of the Python that runs it, so each has figures of its own.
    stored = json.loads(STORED.read_text())
    version = ".".join(platform.python_version_tuple()[:2])
    for source, bits in stored[version].items():
        assert found[source] == pytest.approx(bits, rel=0.01), source
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    out = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=8)
    assert len(tokenizer.decode(out[0])) > 4
