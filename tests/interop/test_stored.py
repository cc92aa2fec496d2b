"""Whatever wrote it, a network is opened the same way, and read only as far as it is needed."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from runs import bits, files, lines, run
from weights import NETWORKS, SMALL, changed, random_leaves

import mobilellm_jax
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import huggingface
from mobilellm_jax.interop.stored import CHECKPOINT, load, open_model, write_checkpoint
from mobilellm_jax.leaves import flat, nested, place
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.parallel.sharding import shardings
from mobilellm_jax.training.checkpoint import load_model


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def workdir(plan, tmp_path_factory):
    """A run with evaluations at the steps 2, 4 and 5, and the checkpoints 4 and 5."""
    config = tiny.config(plan, steps=5)
    config.eval.every = 2
    directory = tmp_path_factory.mktemp("run") / "run"
    run(config, directory)
    return directory


@pytest.fixture(scope="module")
def places(workdir, tmp_path_factory):
    """The same network wherever it can be."""
    out = tmp_path_factory.mktemp("out")
    stored = open_model(workdir)
    for family in ("llama", "hf_shared"):
        huggingface.export(stored.leaves, stored.model, stored.tokenizer, out / family, family)
    write_checkpoint(open_model(out / "llama"), out / "a name: with # and %20")
    return {
        "workdir": workdir,
        "checkpoints": workdir / "checkpoints",
        "step": workdir / "checkpoints/5",
        "llama": out / "llama",
        "hf_shared": out / "hf_shared",
        "alone": out / "a name: with # and %20",
    }


PLACES = ["workdir", "checkpoints", "step", "llama", "hf_shared", "alone"]


@pytest.mark.parametrize("place_name", PLACES)
def test_the_network_is_the_same_from_anywhere(place_name, places, workdir):
    expected = load_model(workdir)
    stored = open_model(places[place_name])
    assert stored.model == expected.model == tiny.MODEL
    assert stored.dtype == "float32"
    assert stored.family == (place_name if place_name in ("llama", "hf_shared") else CHECKPOINT)
    assert stored.step == (5 if place_name in ("workdir", "checkpoints", "step") else 0)
    assert stored.tokenizer.fingerprint == tiny.tokenizer().fingerprint
    assert bits(stored.params()) == bits(expected.params)
    model, params, tokenizer = mobilellm_jax.load(str(places[place_name]))
    assert model == tiny.MODEL and tokenizer.fingerprint == tiny.tokenizer().fingerprint
    assert bits(params) == bits(expected.params)


@pytest.mark.parametrize("place_name", ["workdir", "llama", "hf_shared"])
def test_weights_go_straight_into_their_shardings(place_name, places):
    stored = open_model(places[place_name])
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices())
    wanted = shardings(nested(dict(stored.leaves)), mesh)
    params = stored.params(wanted, "bfloat16")
    for path, array in flat(params).items():
        assert array.sharding == flat(wanted)[path]
        whole = stored.leaves[path][:].astype(array.dtype)
        assert array.dtype.name == "bfloat16"
        np.testing.assert_array_equal(np.asarray(array), whole)
    assert params["embedding"].addressable_shards[0].data.shape == (tiny.VOCAB, 8)


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (8, 1)])
def test_every_device_asks_for_its_slice_only(mesh):
    asked = []

    @dataclasses.dataclass
    class Watched:
        array: np.ndarray
        shape = property(lambda self: self.array.shape)
        dtype = property(lambda self: self.array.dtype)

        def __getitem__(self, index):
            asked.append(self.array[index].size)
            return self.array[index]

    array = np.arange(6 * 16 * 4, dtype=np.float32).reshape(6, 16, 4)
    leaves = {"stack_0/mlp/up": Watched(array)}
    wanted = shardings(
        nested(leaves), make_mesh(dict(zip(("data", "fsdp"), mesh, strict=True)), jax.devices())
    )
    placed = place(leaves, wanted)["stack_0"]["mlp"]["up"]
    np.testing.assert_array_equal(np.asarray(placed), array)
    assert set(asked) == {array.size // mesh[1]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_keeps_the_dtype_of_its_weights(dtype, tmp_path):
    leaves = random_leaves(SMALL, dtype)
    huggingface.export(leaves, SMALL, tiny.tokenizer(), tmp_path / "hf")
    write_checkpoint(open_model(tmp_path / "hf"), tmp_path / "kept")
    write_checkpoint(open_model(tmp_path / "hf"), tmp_path / "changed", "bfloat16")
    kept = open_model(tmp_path / "kept")
    assert kept.dtype == dtype
    assert bits(kept.params()) == bits(load_model(tmp_path / "kept").params) == bits(nested(leaves))
    rounded = {path: leaf.astype("bfloat16") for path, leaf in leaves.items()}
    assert bits(open_model(tmp_path / "changed").params()) == bits(nested(rounded))
    assert kept.meta["origin"] == {"directory": str(tmp_path / "hf"), "family": "llama"}


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (np.nan, None)])
def test_a_checkpoint_of_weights_that_are_not_finite_is_refused(value, dtype, places, tmp_path):
    stored = open_model(places["llama"])
    leaves = {path: leaf[:].copy() for path, leaf in stored.leaves.items()}
    leaves["stack_0/mlp/up"][0, 0, 0] = value
    stored = dataclasses.replace(stored, leaves=leaves)
    with pytest.raises(UserError, match=r"stack_0/mlp/up is not finite in float.*\.$"):
        write_checkpoint(stored, tmp_path / "out", dtype)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_that_stands_alone_is_no_workdir(places, plan):
    before = files(places["alone"])
    with pytest.raises(UserError, match=r"is a checkpoint and no workdir: .*init_from="):
        run(tiny.config(plan), places["alone"])
    assert files(places["alone"]) == before


def test_it_overwrites_nothing_and_leaves_nothing_half_written(places, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    stored = open_model(places["llama"])
    with pytest.raises(UserError, match="not empty"):
        write_checkpoint(stored, tmp_path / "out")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("orbax.checkpoint.JsonCheckpointHandler.save", interrupted)
    monkeypatch.setattr("orbax.checkpoint.JsonCheckpointHandler.async_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(stored, tmp_path / "other")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_folder_without_a_tokenizer_has_weights_all_the_same(places, tmp_path):
    folder = shutil.copytree(places["llama"], tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()
    stored = open_model(folder)
    assert stored.tokenizer is None
    assert bits(stored.params()) == bits(open_model(places["llama"]).params())
    for use in (lambda: load(folder), lambda: write_checkpoint(stored, tmp_path / "out")):
        with pytest.raises(UserError, match="hf has no tokenizer: put its tokenizer.json"):
            use()
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_with_more_pieces_than_embeddings_is_refused(tmp_path):
    model = changed(vocab_size=tiny.VOCAB + 8)
    huggingface.export(random_leaves(model), model, tiny.tokenizer(), tmp_path / "hf")
    assert open_model(tmp_path / "hf").model == model  # more embeddings are padding
    (tmp_path / "hf/tokenizer.json").unlink()
    larger = train_tokenizer(tiny.documents("sums", 200) + tiny.documents("words", 200), 330)
    larger.write(tmp_path / "hf")
    with pytest.raises(UserError, match="has 330 pieces and the network 328 embeddings"):
        open_model(tmp_path / "hf")


@pytest.mark.parametrize("name", ["nowhere", "empty", "text.json"])
def test_where_there_is_no_network_a_sentence_says_so(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint in .*or a Hugging Face folder"):
        open_model(tmp_path / name)


def test_a_workdirs_own_configuration_is_no_hugging_face_folder(workdir):
    assert "model" in json.loads((workdir / "config.json").read_text())
    assert open_model(workdir).family == CHECKPOINT


def test_a_damaged_checkpoint_is_told(places, tmp_path):
    folder = shutil.copytree(places["alone"], tmp_path / "checkpoint")
    (folder / "params/manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="checkpoint is damaged"):
        open_model(folder)


def test_what_was_measured_up_to_a_step_is_found(workdir):
    heldout = lines(workdir, "heldout")
    assert sorted(heldout) == [2, 4, 5]
    for step in (4, 5):
        found = open_model(workdir / f"checkpoints/{step}").description["heldout"]
        assert found["step"] == step and found["bits_per_byte"] == heldout[step]["bits_per_byte"]


def test_what_a_kill_left_of_a_measurement_is_passed_over(workdir, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        for torn in (
            b'{"kind": "heldout", "st',
            b'{"kind": "heldout"}',
            b'"heldout"\xff',
            b'["heldout"]',
        ):
            file.write(torn + b"\n")
    assert open_model(run).description["heldout"]["step"] == 5


def test_a_model_card_of_a_run(workdir, tmp_path):
    stored = open_model(workdir)
    huggingface.export(
        stored.leaves, stored.model, stored.tokenizer, tmp_path / "out", meta=stored.description
    )
    card = (tmp_path / "out/README.md").read_text()
    assert f"{5 * 16 * tiny.ROW:,} tokens in 5 steps" in card
    assert "| words | 70.0% |" in card and "| sums | 30.0% |" in card
    measured = lines(workdir, "heldout")[5]
    assert f"| words | {measured['bits_per_byte/words']:.4f} |" in card


def test_importing_the_package_stays_light():
    program = (
        "import sys, mobilellm_jax\n"
        "print(mobilellm_jax.__version__, 'jax' in sys.modules, 'numpy' in sys.modules)\n"
        "try:\n    mobilellm_jax.nothing\n"
        "except AttributeError as error:\n    print(error)\n"
        "print(callable(mobilellm_jax.load), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    first, second, third = done.stdout.splitlines()
    assert first == f"{mobilellm_jax.__version__} False False"
    assert "has no attribute 'nothing'" in second
    assert third == "True False"


def test_untied_and_normed_networks_are_placed_as_well(tmp_path):
    """Every kind of leaf, sharded over eight devices: heads interleaved, transposed, biased."""
    mesh = make_mesh({"data": 1, "fsdp": 8}, jax.devices())
    for i, name in enumerate(["biases", "scaled QK-norm"]):
        model = NETWORKS[name]
        leaves = random_leaves(model)
        huggingface.export(leaves, model, tiny.tokenizer(), tmp_path / str(i))
        stored = open_model(tmp_path / str(i))
        placed = stored.params(shardings(nested(dict(stored.leaves)), mesh))
        assert bits(placed) == bits(nested(leaves))
