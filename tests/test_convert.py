"""From a checkpoint to what a user of Hugging Face types."""

import pathlib
import pydoc_data.topics
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from mobilellm_jax.convert import convert
from mobilellm_jax.data.tokenizers import train_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.training.checkpoint import Checkpoints, load_model
from mobilellm_jax.training.step import init_state

MODEL = ModelConfig(
    512, 24, (Stack(2, 3, 1, 32, repeats=2),), head_dim=8, max_length=64, init_std=0.2
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that has saved step 3."""
    directory = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(list(pydoc_data.topics.topics.values())[:10], MODEL.vocab_size)
    params = jax.jit(transformer.init, static_argnums=0)(MODEL, jax.random.key(0))
    checkpoints = Checkpoints(directory, every=1, keep=1, keep_every=0)
    meta = {"step": 3, "config": {"model": MODEL.to_dict()}}
    checkpoints.save(init_state(params, optax.sgd), meta, tokenizer)
    checkpoints.wait()
    checkpoints.close()
    return directory


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mobilellm_jax.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_printed_lines_load_the_model(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    arguments = [f"--checkpoint={workdir}", "--to=hf", f"--out={tmp_path / 'out'}"]
    done = program(*arguments)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "out").iterdir():
        assert str(path) in done.stdout
    user: dict[str, object] = {}
    exec(done.stdout.split("Load it with")[1], user)

    loaded = load_model(workdir)
    text = "for x in range(10):\n    print(x)"
    inputs = user["tokenizer"](text, return_tensors="pt")
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
    assert inputs["input_ids"].tolist() == [ids]
    with torch.no_grad():
        theirs_TV = user["model"](**inputs).logits[0].numpy()
    hidden_BTD = transformer.apply(loaded.params, loaded.model, np.array([ids]))
    ours_TV = np.asarray(transformer.logits(loaded.params, loaded.model, hidden_BTD)[0])
    assert np.abs(ours_TV - theirs_TV).max() <= 1e-4

    again = program(*arguments)
    assert again.returncode == 1
    last = again.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "not empty" in last and "Traceback" not in again.stderr


def test_dtype_reaches_the_file(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16", "float16"):
        convert(workdir / "checkpoints", tmp_path / dtype, dtype)
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
        assert f'"dtype": "{dtype}"' in (tmp_path / dtype / "config.json").read_text()
    assert max(sizes["bfloat16"], sizes["float16"]) < 0.6 * sizes["float32"]


def test_no_checkpoint_is_said_and_nothing_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_an_unknown_format_is_said(tmp_path: pathlib.Path) -> None:
    done = program("--checkpoint=x", "--to=gguf", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "hf" in done.stderr
