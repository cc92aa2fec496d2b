"""Matrices of integers in a folder: transformers and compressed-tensors compute what is computed here."""

import dataclasses
import json

import numpy as np
import pytest
import runs
import tiny
import weights
from weights import NETWORKS, SMALL, V, load_stock, random_leaves, random_tokens

pytest.importorskip("qwix", reason="qwix is not installed")

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import gguf, hf_folder, huggingface, official_torch, safetensors_files
from mobilellm_jax.interop.layout import default_family
from mobilellm_jax.leaves import nested
from mobilellm_jax.training.checkpoint import write_model

UNTIED = NETWORKS["untied"]


def eight_bit(model, quantization):
    return dataclasses.replace(model, quantization=quantization)


def logits(model, leaves, tokens_BT):
    return np.asarray(weights.logits(nested(leaves), model, tokens_BT))


KINDS = pytest.mark.parametrize(
    "name, parts, family",
    [
        ("plain", "blocks", None),
        ("untied", "blocks+head", None),
        ("shared twice", "blocks", None),
        ("shared twice", "blocks", "hf_shared"),
        ("unit QK-norm", "blocks", "llama4_text"),
    ],
)


@KINDS
def test_logits(name, parts, family, tmp_path):
    """Where a factor lies between two integers the two round it to one or the other: seldom."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    model = eight_bit(NETWORKS[name], f"w8a8:{parts}")
    leaves = random_leaves(model)
    huggingface.export(leaves, model, tiny.tokenizer(), tmp_path / "out", family)
    loaded = load_stock(tmp_path / "out", trust_remote_code=family == "hf_shared")
    tokens_BT = random_tokens(model)
    with torch.no_grad():
        their_logits = loaded.eval()(torch.tensor(tokens_BT)).logits.numpy()
    own, exact = (logits(m, leaves, tokens_BT) for m in (model, NETWORKS[name]))
    rounding = np.abs(exact - own)
    off = np.abs(their_logits - own)
    assert rounding.max() > 0.01 and off.mean() < 0.1 * rounding.mean()
    assert np.median(off) < 1e-3 * np.abs(own).max()


@KINDS
def test_a_folder_is_read_back(name, parts, family, tmp_path):
    """As the network that it was, whose weights, rounded once, round to the same integers again."""
    model, tokenizer = eight_bit(NETWORKS[name], f"w8a8:{parts}"), tiny.tokenizer()
    leaves = random_leaves(model)
    huggingface.export(leaves, model, tokenizer, tmp_path / "out", family)
    found = hf_folder.open_folder(tmp_path / "out")
    assert found.model == model
    back = {path: leaf[:] for path, leaf in found.leaves.items()}
    for path, leaf in back.items():
        exact = path.endswith("scale") or path == "embedding" or (path, parts) == ("head", "blocks")
        assert np.array_equal(leaf, leaves[path]) == exact, path
        if exact:
            continue
        layer, some = found.leaves[path][1:2], found.leaves[path][0, 1:3]
        np.testing.assert_array_equal(layer, leaf[1:2])
        np.testing.assert_array_equal(some, leaf[0, 1:3])
    huggingface.export(back, model, tokenizer, tmp_path / "again", family)
    first, second = (
        safetensors_files.open_file(tmp_path / name / "model.safetensors")
        for name in ("out", "again")
    )
    assert first.keys() == second.keys()
    for tensor in first:
        close = 1e-6 if tensor.endswith("_scale") else 0
        np.testing.assert_allclose(second[tensor][:], first[tensor][:], rtol=close, atol=0)


def test_the_files_hold_integers_and_scales(tmp_path):
    model = eight_bit(UNTIED, "w8a8:blocks+head")
    leaves = random_leaves(model)
    huggingface.export(leaves, model, tiny.tokenizer(), tmp_path / "out", dtype="bfloat16")
    found = safetensors_files.open_file(tmp_path / "out/model.safetensors")
    floats = huggingface.tensors(leaves, UNTIED, default_family(UNTIED))
    for name, tensor in floats.items():
        matrix = name == "lm_head.weight" or "_proj" in name
        assert found[name].dtype.name == ("int8" if matrix else "bfloat16"), name
        if matrix:
            scale = found[f"{name}_scale"]
            assert scale.shape == (tensor.shape[0], 1) and scale.dtype.name == "bfloat16"
            exact = tensor[:]
            off = np.abs(found[name][:].astype(np.float32) * np.float32(scale[:]) - exact)
            # Half a step, and what bfloat16 leaves of weight and scale.
            assert (off.max(1) < (0.5 / 127 + 2**-7) * np.abs(exact).max(1)).all()
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["ignore"] == [] and config["quant_method"] == "compressed-tensors"
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert size < 0.7 * sum(2 * tensor[:].size for tensor in floats.values())


def as_of_others(model, folder):
    """Writes a folder; its config.json, and what that says without our own words."""
    huggingface.export(random_leaves(model), model, tiny.tokenizer(), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["mobilellm_jax"]
    return folder / "config.json", config


def test_what_other_programs_say(tmp_path):
    """What they add and changes no number is passed over; other integers are not taken for these."""
    model = eight_bit(SMALL, "w8a8:blocks")
    path, config = as_of_others(model, tmp_path / "out")

    def read(weights=None, factors=None, **changes):
        said = json.loads(json.dumps(config))
        group = said["quantization_config"]["config_groups"].pop("group_0")
        group["weights"] |= {"group_size": None, "observer": "minmax", "actorder": None} | (
            weights or {}
        )
        group["input_activations"] |= factors or {}
        group |= {"output_activations": None, "format": None}
        said["quantization_config"]["config_groups"]["config_0"] = group
        said["quantization_config"] |= {"kv_cache_scheme": None, "version": "0.17.0"} | changes
        path.write_text(json.dumps(said))
        return hf_folder.open_folder(tmp_path / "out")

    assert read().model == model
    for changes in (
        {"weights": {"num_bits": 4}},
        {"weights": {"strategy": "group", "group_size": 32}},
        {"weights": {"symmetric": False}},
        {"factors": {"symmetric": True}},
        {"factors": {"dynamic": False}},
        {"ignore": []},  # the head is the embedding
        {"ignore": ["lm_head", "model.layers.0.self_attn.q_proj"]},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"format": "pack-quantized"},
        {"quant_method": "gptq"},
        {"config_groups": {}},
        {"config_groups": ["all"]},
    ):
        with pytest.raises(UserError, match="config.json: quantization_config=.* does not have"):
            read(**changes)
    read()
    weights_path = tmp_path / "out/model.safetensors"
    tensors = safetensors_files.open_file(weights_path)
    for name, other in (("no", None), ("fewer", np.ones((3, 1), np.float32))):
        kept = {n: t[:] for n, t in tensors.items()}
        scales = kept.pop("model.layers.0.mlp.up_proj.weight_scale")
        assert scales.shape != (3, 1)
        if other is not None:
            kept["model.layers.0.mlp.up_proj.weight_scale"] = other
        (tmp_path / name).mkdir()
        safetensors_files.write_files(tmp_path / name, kept)
        (tmp_path / name / "config.json").write_text(path.read_text())
        with pytest.raises(UserError, match=r"no model.layers.0.mlp.up_proj.weight_scale with one"):
            hf_folder.open_folder(tmp_path / name)


def test_others_do_not_name_a_head_of_integers(tmp_path):
    """vLLM has to be told of it; what wrote a folder for transformers may have said Linear alone."""
    model = eight_bit(UNTIED, "w8a8:blocks+head")
    path, config = as_of_others(model, tmp_path / "out")
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["targets"] == ["Linear", "lm_head"]
    for targets in (["Linear", "lm_head"], ["Linear"]):
        group["targets"] = targets
        path.write_text(json.dumps(config))
        assert hf_folder.open_folder(tmp_path / "out").model == model
    group["targets"] = ["lm_head"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json: quantization_config=.* does not have"):
        hf_folder.open_folder(tmp_path / "out")


def test_what_no_file_can_say_is_refused(tmp_path):
    leaves, tokenizer = random_leaves(SMALL), tiny.tokenizer()
    with pytest.raises(
        UserError, match=r"numbers of its embedding and head .*quantize=w8a8:blocks"
    ):
        huggingface.export(leaves, eight_bit(SMALL, "w8a8"), tokenizer, tmp_path / "a")
    with pytest.raises(UserError, match=r"its embedding have 8 bits .*w8a8:blocks\+head"):
        whole = eight_bit(UNTIED, "w8a8")
        huggingface.export(random_leaves(whole), whole, tokenizer, tmp_path / "b")
    blocks = eight_bit(SMALL, "w8a8:blocks")
    with pytest.raises(UserError, match=r"its blocks have 8 bits .*none leaves rounding"):
        gguf.export(leaves, blocks, tokenizer, tmp_path / "c.gguf")
    with pytest.raises(UserError, match=r"its blocks have 8 bits .*none leaves rounding"):
        official_torch.export(leaves, blocks, tokenizer, tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_the_program(tmp_path):
    """A checkpoint becomes one that rounds, or a folder of integers, which becomes one again."""
    write_model(random_leaves(SMALL), SMALL, tiny.tokenizer(), {}, tmp_path / "run")

    def convert(*arguments):
        return runs.program("mobilellm_jax.convert", *arguments)

    given = f"--checkpoint={tmp_path}/run", "--quantize=w8a8"
    ended = convert(*given, "--to=checkpoint", f"--out={tmp_path}/eight")
    assert ended.status == 0, ended
    import mobilellm_jax

    model, params, _ = mobilellm_jax.load(tmp_path / "eight")
    assert model == eight_bit(SMALL, "w8a8") and model.vocab_size == V
    ended = convert(*given, "--to=hf", f"--out={tmp_path}/hf")
    assert ended.status == 1 and "--quantize=w8a8:blocks" in ended.err
    ended = convert(given[0], "--quantize=w8a8:blocks", "--to=hf", f"--out={tmp_path}/hf")
    assert ended.status == 0 and "transformers needs compressed-tensors" in ended.out, ended
    ended = convert(f"--checkpoint={tmp_path}/hf", f"--out={tmp_path}/back")
    assert ended.status == 0, ended
    assert mobilellm_jax.load(tmp_path / "back")[0] == eight_bit(SMALL, "w8a8:blocks")
    ended = convert(given[0], "--quantize=int8", "--to=hf", f"--out={tmp_path}/none")
    assert ended.status == 1 and "quantization='int8' is not none, w8a8" in ended.err
