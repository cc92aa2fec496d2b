"""The program `convert`: every format from a checkpoint and back, and what lies in a folder."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import optax
import pytest
import runs
import tiny
import weights
from tokenizer_files import llama3_folder

import mobilellm_jax
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.interop import stored
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack, parameter_count
from mobilellm_jax.training.saving import Checkpoints
from mobilellm_jax.training.step import init_state

SHARED = ModelConfig(
    tiny.VOCAB, 32, (Stack(2, 4, 2, 64, repeats=2),), head_dim=8, max_length=64, init_std=0.2
)
R1 = dataclasses.replace(SHARED, stacks=(Stack(2, 4, 2, 64),), qk_norm="unit")
COUNT = f"{parameter_count(SHARED):,}"


def save(directory: pathlib.Path, model: ModelConfig, tokenizer: Tokenizer) -> pathlib.Path:
    """A run of this network that has saved step 3."""
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
    checkpoints = Checkpoints(directory, every=1, keep=1, keep_every=0)
    meta = {"step": 3, "rows": 24, "config": {"model": model.to_dict()}}
    checkpoints.save(init_state(params, optax.sgd), meta, tokenizer)
    checkpoints.close()
    return directory


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save(tmp_path_factory.mktemp("run"), SHARED, tiny.tokenizer())


def convert(*arguments: object) -> runs.Ended:
    return runs.program("mobilellm_jax.convert", *map(str, arguments))


def logits(directory: pathlib.Path, ids: list[int]) -> np.ndarray:
    """Of our network, by what is loaded from a folder."""
    model, params, _ = mobilellm_jax.load(directory)
    return np.asarray(weights.logits(params, model, np.array([ids]))[0])


def bits(directory: pathlib.Path) -> dict[str, bytes]:
    return {path: leaf[:].tobytes() for path, leaf in stored.open_model(directory).leaves.items()}


@pytest.mark.parametrize("to", ["hf", "hf-shared"])
def test_the_printed_lines_load_the_model_in_transformers(to, workdir, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    done = convert(f"--checkpoint={workdir}", f"--to={to}", f"--out={tmp_path / 'out'}")
    assert done.status == 0, done.err
    for path in (tmp_path / "out").iterdir():
        assert str(path) in done.out
    user: dict[str, object] = {}
    exec(done.out.split("Load it with")[1], user)

    text = "3 + 4 = 7\nthe model reads"
    _, _, tokenizer = mobilellm_jax.load(workdir)
    inputs = user["tokenizer"](text, return_tensors="pt")
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert inputs["input_ids"].tolist() == [ids]
    with torch.no_grad():
        theirs_TV = user["model"](**inputs).logits[0].numpy()
    ours_TV = logits(workdir, ids)
    assert ours_TV.std() > 0.1
    assert np.abs(ours_TV - theirs_TV).max() <= 1e-4

    before = runs.files(tmp_path)
    again = convert(f"--checkpoint={workdir}", f"--to={to}", f"--out={tmp_path / 'out'}")
    assert again.status == 1 and "not empty" in again.err
    assert runs.files(tmp_path) == before


@pytest.mark.parametrize("to", ["hf", "hf-shared"])
def test_there_and_back_is_the_same_to_the_bit(to, workdir, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    assert convert(f"--checkpoint={workdir}", f"--to={to}", f"--out={there}").status == 0
    done = convert("--from=hf", f"--checkpoint={there}", f"--out={back}")
    assert done.status == 0, done.err
    assert bits(back) == bits(there) == bits(workdir)
    assert stored.open_model(back).model == SHARED
    assert mobilellm_jax.load(back)[2].fingerprint == tiny.tokenizer().fingerprint


def test_dtype_reaches_the_file_and_stays(workdir, tmp_path):
    half, back = tmp_path / "half", tmp_path / "back"
    assert convert(
        f"--checkpoint={workdir}", "--to=hf", "--dtype=bfloat16", f"--out={half}"
    ).out.count("safetensors")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert convert(f"--checkpoint={half}", f"--out={back}").status == 0
    assert stored.open_model(back).dtype == stored.open_model(half).dtype == "bfloat16"
    assert bits(back) == bits(half)


def test_qk_norm_as_either_architecture(tmp_path):
    workdir = save(tmp_path / "run", R1, tiny.tokenizer())
    for architecture in ("qwen3", "llama4_text"):
        out = tmp_path / architecture
        done = convert(
            f"--checkpoint={workdir}", "--to=hf", f"--architecture={architecture}", f"--out={out}"
        )
        assert done.status == 0, done.err
        assert json.loads((out / "config.json").read_text())["model_type"] == architecture
        assert bits(out) == bits(workdir)
        assert stored.open_model(out).model == R1


@pytest.mark.parametrize("to", ["checkpoint", "hf", "hf-shared", "gguf"])
def test_inspection(to, workdir, tmp_path):
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    if to == "gguf":
        pytest.importorskip("gguf")
    if to == "checkpoint":
        out = workdir
    else:
        assert convert(f"--checkpoint={workdir}", f"--to={to}", f"--out={out}").status == 0
    seen = convert("--inspect", out)
    assert seen.status == 0, seen.err
    assert "one matrix" in seen.out  # tied
    assert f"{tiny.VOCAB} pieces, BOS 1, EOS 2, no chat template" in seen.out
    formats = {"checkpoint": "checkpoint", "gguf": "GGUF, architecture llama"}
    assert formats.get(to, "Hugging Face folder") in seen.out
    dtype = "F32" if to == "gguf" else "float32"
    total = seen.out.splitlines()[-1]
    assert dtype in total
    unrolled = dataclasses.replace(SHARED, stacks=(Stack(4, 4, 2, 64),))
    count = parameter_count(SHARED if to in ("checkpoint", "hf-shared") else unrolled)
    assert total.split()[-1] == f"{count:,}"
    if to != "gguf":
        assert COUNT in seen.out and "each applied 2 times" in seen.out


def test_inspection_of_what_cannot_be_used(workdir, tmp_path):
    """Another architecture's tensors are shown all the same, with the reason."""
    out = tmp_path / "out"
    convert(f"--checkpoint={workdir}", "--to=hf", f"--out={out}")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    seen = convert("--inspect", out)
    assert seen.status == 0 and "cannot be used here" in seen.out and "gpt_neox" in seen.out
    assert "model.layers.*.mlp.up_proj.weight" in seen.out
    (out / "config.json").write_text(json.dumps(config | {"architectures": [1]}))
    seen = convert("--inspect", out)
    assert seen.status == 0 and "Hugging Face folder, 1 (model_type" in seen.out


def official_folder(path: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """As the code published with MobileLLM writes a layer-shared network, with a tokenizer."""
    convert(f"--checkpoint={workdir}", "--to=hf-shared", f"--out={path}")
    weights = stored.open_model(path)
    assert weights.model.stacks[0].repeats == 2
    config = json.loads((path / "config.json").read_text())
    stack = SHARED.stacks[0]
    for key in ("mobilellm_jax", "auto_map"):
        del config[key]
    config |= {
        "model_type": "mobilellm",
        "architectures": ["MobileLLMForCausalLM"],
        "num_hidden_layers": stack.layers,
        "intermediate_size": stack.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": SHARED.norm_eps,
        "rope_theta": SHARED.rope_theta,
        "tie_word_embeddings": False,
        "share_embedding": True,
        "layer_sharing": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    file = path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].decode().replace("model.stacks.0.layers", "model.layers")
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + raw[8 + length :])
    return path


def test_an_official_shared_network_is_measured_both_ways(workdir, tmp_path):
    folder = official_folder(tmp_path / "official", workdir)
    (tmp_path / "text.txt").write_text("the model reads small rows of text. " * 50)
    text = f"--text={tmp_path / 'text.txt'}"
    found = {}
    for ls_kv in ("fresh", "first_pass"):
        out = tmp_path / ls_kv
        done = convert(
            "--from=hf", f"--checkpoint={folder}", f"--out={out}", f"--ls_kv={ls_kv}", text
        )
        assert done.status == 0, done.err
        lines = [line for line in done.out.splitlines() if "perplexity" in line]
        values = {line.split(":")[0]: float(line.split()[2]) for line in lines}
        assert set(values) == {"ls_kv=fresh", "ls_kv=first_pass"}
        assert [line for line in lines if "converted so" in line][0].startswith(f"ls_kv={ls_kv}:")
        assert stored.open_model(out).model == dataclasses.replace(SHARED, ls_kv=ls_kv)
        found[ls_kv] = values
    assert found["fresh"] == found["first_pass"]
    assert found["fresh"]["ls_kv=fresh"] != found["fresh"]["ls_kv=first_pass"]


def test_a_tokenizer_of_hugging_face_travels(tmp_path):
    folder = llama3_folder(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(folder)
    model = dataclasses.replace(SHARED, vocab_size=tokenizer.vocab_size + 7)  # padded, as Qwen's
    workdir = save(tmp_path / "run", model, tokenizer)
    for to in ("hf", "hf-shared"):
        out = tmp_path / to
        done = convert(f"--checkpoint={workdir}", f"--to={to}", f"--out={out}")
        assert done.status == 0, done.err
        found = mobilellm_jax.load(out)[2]
        assert found.fingerprint == tokenizer.fingerprint
        assert found.chat_template == tokenizer.chat_template is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint={run}", "--out={out}"], "--to is missing"),
        (["--checkpoint={run}", "--to=hf", "--out={out}", "--from=hf"], "not of that kind"),
        (["--checkpoint={run}", "--to=hf", "--out={out}", "--ls_kv=fresh"], "--ls_kv=fresh is for"),
        (["--checkpoint={out}", "--to=hf", "--out={out}"], "no checkpoint"),
        (["--checkpoint={run}", "--to=hf", "--out={out}", "--architecture=qwen3"], "QK-norm"),
        (["--inspect={out}"], "no checkpoint"),
        (["--checkpoint={run}", "--to=onnx", "--dtype=float16", "--out={out}"], "--dtype=float16"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, said, workdir, tmp_path):
    places = {"run": workdir, "out": tmp_path / "out"}
    done = convert(*(argument.format(**places) for argument in arguments))
    assert done.status == 1 and said in done.err and "Traceback" not in done.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint=x", "--to=safetensors", "--out=y"], "hf-shared"),
        (["--checkpoint=x", "--to=hf"], "--out are needed"),
        (["--out=y", "--to=hf"], "--out are needed"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(arguments, said):
    done = convert(*arguments)
    assert done.status == 2 and said in done.err
