"""A checkpoint explains itself, is found from anywhere near it, and is whole or not there."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from etils import epath
from runs import bits, files, finish, run, start

from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.training.checkpoint import FORMAT, find, load_model
from mobilellm_jax.training.provenance import PACKAGES
from mobilellm_jax.training.saving import Checkpoints
from mobilellm_jax.training.step import init_state

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(plan, tmp_path_factory):
    """Workdir and last state of a run with the checkpoints 4, 8 and 12."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, run(tiny.config(plan), workdir)


def saved(folder, every, keep, keep_every, steps):
    """Which steps are kept after a loop of `steps` steps that saves as the trainer does."""
    checkpoints = Checkpoints(epath.Path(folder), every, keep, keep_every)
    state = init_state({"w": jnp.arange(3.0)}, lambda rate: optax.adam(rate))
    for step in range(1, steps + 1):
        if checkpoints.due(step):
            checkpoints.save(state, {"step": step}, tiny.tokenizer())
    checkpoints.save(state, {"step": steps}, tiny.tokenizer())  # the last one, due or not
    checkpoints.close()
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "every, keep, keep_every, steps, kept",
    [
        (2, 2, 0, 9, [8, 9]),
        (2, 1, 6, 14, [6, 12, 14]),
        (3, 2, 3, 7, [3, 6, 7]),
        (5, 3, 0, 4, [4]),
    ],
)
def test_the_newest_stay_and_every_kth(tmp_path, every, keep, keep_every, steps, kept):
    assert saved(tmp_path, every, keep, keep_every, steps) == kept


def test_a_run_saves_when_it_is_due_and_at_no_other_time(plan, tmp_path, trained):
    """Not after the first step either, which Orbax would do by itself."""
    config = tiny.config(plan)
    config.checkpoint.keep = 20
    run(config, tmp_path / "run", stop_at=9)
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == [4, 8, 9]


def test_it_is_found_from_its_workdir_its_folder_and_itself(trained, monkeypatch):
    workdir, state = trained
    monkeypatch.chdir(workdir.parent)
    for place, step in (
        (workdir, 12),
        (str(workdir), 12),
        (workdir / "checkpoints", 12),
        (workdir / "checkpoints" / "8", 8),
        ("run", 12),
        ("./run/checkpoints/8", 8),
    ):
        assert load_model(place).step == step
    loaded = load_model("run")
    assert bits(loaded.params) == bits(state.params)
    assert loaded.model == tiny.MODEL
    assert loaded.tokenizer.fingerprint == tiny.tokenizer().fingerprint
    assert loaded.tokenizer.encode("small deep") == tiny.tokenizer().encode("small deep")


def test_it_needs_nothing_beside_it(trained, tmp_path):
    """Neither the workdir nor the data: one step's folder is enough, wherever it lies."""
    shutil.copytree(trained[0] / "checkpoints" / "12", tmp_path / "elsewhere")
    assert bits(load_model(tmp_path / "elsewhere").params) == bits(trained[1].params)


def test_its_description_is_complete(plan, trained):
    meta = load_model(trained[0]).meta
    plan = Plan.load(plan)
    assert meta["format"] == FORMAT
    assert (meta["step"], meta["rows"]) == (12, 192)
    assert meta["plan_hash"] == plan.hash and meta["plan"] == plan.to_dict()
    assert meta["plan"]["tokenizer"]["fingerprint"] == tiny.tokenizer().fingerprint
    assert set(meta["packages"]) == {"mobilellm_jax", "python", *PACKAGES}
    assert set(meta["devices"]) == {"kind", "count", "processes", "cpu_threads"}
    assert meta["commit"]
    assert meta["config"] == json.loads((trained[0] / "config.json").read_text())


def test_another_process_loads_the_same_weights(trained):
    program = (
        "import hashlib, jax, sys\n"
        "from mobilellm_jax.training.checkpoint import load_model\n"
        "params = jax.device_get(load_model(sys.argv[1]).params)\n"
        "data = b''.join(x.tobytes() for x in jax.tree.leaves(params))\n"
        "print(hashlib.sha256(data).hexdigest())\n"
    )
    ended = finish(start("-c", program, trained[0]))
    import hashlib

    data = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(trained[1].params))
    assert ended.out.strip() == hashlib.sha256(data).hexdigest(), ended.err


def test_it_is_restored_into_other_shardings(trained, tmp_path):
    """Through `Checkpoints` itself, over 2 x 4 devices: each device reads its part."""
    from mobilellm_jax.parallel.mesh import make_mesh
    from mobilellm_jax.parallel.sharding import shardings

    workdir, state = trained
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices())
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings(state, mesh),
    )
    checkpoints = Checkpoints(epath.Path(workdir), 4, 3, 0)
    found = checkpoints.restore(abstract, 12)
    checkpoints.close()
    assert bits(found) == bits(state)
    assert found.params["embedding"].addressable_shards[0].data.shape == (320, 8)


def test_another_format_is_refused_in_one_sentence(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    meta = workdir / "checkpoints" / "12" / "meta" / "metadata"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": FORMAT + 1}))
    before = files(workdir)
    config = tiny.config(json.loads((workdir / "config.json").read_text())["plan"])
    for use in (lambda: load_model(workdir), lambda: run(config, workdir)):
        with pytest.raises(
            UserError, match=rf"has format {FORMAT + 1}, this program reads {FORMAT}"
        ):
            use()
    assert files(workdir) == before


@pytest.mark.parametrize("key, value", [("step", None), ("rows", "many"), ("config", [])])
def test_a_description_of_the_wrong_kind_is_damage(trained, tmp_path, key, value):
    copy = shutil.copytree(trained[0] / "checkpoints" / "12", tmp_path / "12")
    file = copy / "meta" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"12 is damaged .*its description says {key}="):
        load_model(copy)


def test_nothing_half_written_is_taken_for_a_checkpoint(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    newest = workdir / "checkpoints" / "12"
    newest.rename(newest.with_name("12.orbax-checkpoint-tmp"))
    assert load_model(workdir).step == 8


@pytest.mark.parametrize("part", ["meta", "params", "tokenizer"])
def test_a_damaged_one_is_not_passed_over_in_silence(trained, tmp_path, part):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12" / part)
    with pytest.raises(UserError, match=r"checkpoints/12 is damaged .*move that folder away"):
        load_model(workdir)


def test_where_there_is_none_a_sentence_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "checkpoints"):
        with pytest.raises(UserError, match=f"no checkpoint in {place}.*name a workdir"):
            find(place)
