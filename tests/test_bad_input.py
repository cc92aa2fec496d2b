"""What a user can get wrong: each is one sentence that names it, and nothing of theirs is overwritten."""

import json
import os
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from runs import bits, config_file, files, finish, program, run, start_training

from mobilellm_jax.data.packing import Concat
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import SourceInfo
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.shards import Batch, write_source
from mobilellm_jax.errors import UserError
from mobilellm_jax.training.checkpoint import load_model

TRAIN = "mobilellm_jax.train"

# Threads of Orbax stumble over a checkpoint that cannot be read, after it has been told.
pytestmark = [
    pytest.mark.usefixtures("shared_programs"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture
def plan(intact, tmp_path):
    """A plan with its data, to be spoilt."""
    shutil.copytree(intact.parent, tmp_path / "data")
    return tmp_path / "data" / "mixture.json"


@pytest.fixture(scope="module")
def trained(intact, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run(tiny.config(intact, steps=4), workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    """A finished run, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "run")


def refused(config, workdir, *parts, devices=None):
    """The sentence with which training refuses; it holds all parts, and no file has changed."""
    before = files(workdir)
    with pytest.raises(UserError) as error:
        run(config, workdir, devices=devices)
    sentence = str(error.value)
    for part in parts:
        assert str(part) in sentence, sentence
    assert "\n" not in sentence and sentence.endswith(".")
    assert files(workdir) == before
    return sentence


# --- The command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, parts",
    [
        ("--config.sheduel.peak=1", ("sheduel", 'Did you mean "schedule"')),
        ("--config.schedule.peek=1", ("peek", 'Did you mean "peak"')),
        ("--config.steps=many", ("config.steps=many", "int")),
        ("--config.steps=1.5", ("config.steps=1.5", "int")),
        ("--config.steps=0", ("config.steps=0", "at least 1")),
        ("--config.plan=/nowhere/mixture.json", ("/nowhere/mixture.json", "prepare")),
        ("--config.plan=", ("config.plan is empty", "mixture.json")),
        ("--config.mesh.data=3", ("config.mesh data=3", "8 devices")),
        ("--config.global_batch=12", ("config.global_batch=12", "8 device")),
        ("--config.loss_chunks=5", ("config.loss_chunks=5", "config.row_length=32")),
        ("--config.eval.every=0", ("config.eval.every=0", "at least 1")),
        ("--config.checkpoint.every=0", ("config.checkpoint.every=0", "at least 1")),
        ("--config.checkpoint.keep=0", ("config.checkpoint.keep=0", "at least 1")),
        ("--config.checkpoint.keep_every=-1", ("config.checkpoint.keep_every", "at least 0")),
        ("--config.readers=-1", ("config.readers=-1", "at least 0")),
        ("--config.optimizer.clip=0", ("config.optimizer.clip=0", "every gradient 0")),
        ("--config.schedule.peak=-1", ("config.schedule.peak=-1", "negative")),
        ("--config.schedule.peak=nan", ("config.schedule.peak", "not a number")),
        ("--config.schedule.warmup_steps=12", ("warmup_steps=12", "12 steps of the run")),
        ("--config.execution.dtype=float8", ("execution.dtype='float8'", "bfloat16")),
        ("--config.execution.remat=some", ("execution.remat='some'", "full")),
        ("--config.execution.attention=splash", ("attention='splash'", "tpu", "cpu")),
        ("--config.execution.attention=fast", ("attention='fast'", "flash")),
        ("--config.model.width=0", ("width",)),
        ("--config.model.stacks[0].kv_heads=3", ("stacks[0]", "kv_heads=3")),
        ("--config.model.max_length=16", ("config.row_length=32", "max_length=16")),
        ("--config.model.vocab_size=319", ("319", "320", "config.model.vocab_size=320")),
        ("--config.row_length=24", ("rows of 24", "the 32 that", "multiple or a divisor")),
        ("--config.row_length=64000", ("exceeds the model's context",)),
        ("--config.objective.use=next_token", ("config.objective.use", "package.module:name")),
        ("--config.objective.use=no.such:f", ("config.objective.use", "no module 'no'")),
        ("--config.optimizer.use=optax:lionn", ("config.optimizer.use", "'lionn'")),
        ("--config.optimizer.use=optax:sgd", ("config.optimizer.", "optax:sgd", "takes")),
        ("--config.model.block=mobilellm_jax.model.transformer:Blok", ("block", "'Blok'")),
        ("--stepz=3", ("stepz", "Did you mean")),
        ("--workdir=", ("workdir", "empty")),
        ("stray", ("'stray'",)),
    ],
)
def test_a_bad_argument_is_one_sentence_and_writes_nothing(intact, tmp_path, argument, parts):
    config = config_file(tmp_path, intact)
    ended = program(TRAIN, f"--config={config}", f"--workdir={tmp_path / 'run'}", argument)
    assert ended.status in (1, 2)
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line, parts",
    [
        ("c.optimizer.weight_decai = 0.1", ("weight_decai", 'Did you mean "weight_decay"')),
        ("c.steps = 'many'", ("steps", "<class 'int'>")),
        ("c.steps = = 1", ("invalid syntax",)),
        ("c.steps = step", ("name 'step' is not defined",)),
        ("import no_such_module", ("No module named 'no_such_module'",)),
        ("raise PermissionError('not yours')", ("not yours",)),
    ],
)
def test_a_bad_configuration_file_is_one_sentence_with_its_line(intact, tmp_path, line, parts):
    config = config_file(tmp_path, intact)
    config.write_text(config.read_text().replace("    return c", f"    {line}\n    return c"))
    ended = program(TRAIN, f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert ended.status == 2
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in ended.err
    number = config.read_text().splitlines().index(f"    {line}") + 1
    assert f"{config}:{number}" in last or f"{config.name}, line {number}" in last
    for part in parts:
        assert part in last


def test_a_missing_configuration_file_is_named(tmp_path):
    missing = tmp_path / "missing.py"
    ended = program(TRAIN, f"--config={missing}", f"--workdir={tmp_path / 'run'}")
    assert ended.status == 2
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ") and str(missing) in last and "No such file" in last


# --- The data -------------------------------------------------------------------------------------


def shards(plan, source="words"):
    return sorted((plan.parent / source).glob("*.array_record*"))


def test_a_missing_shard(plan, tmp_path):
    shard = shards(plan)[-1]
    shard.unlink()
    refused(tiny.config(plan), tmp_path / "run", shard, "is missing", "prepare")


def test_a_truncated_shard(plan, tmp_path):
    shard = shards(plan)[-1]
    os.truncate(shard, shard.stat().st_size - 100)
    refused(tiny.config(plan), tmp_path / "run", shard, "bytes instead of", "prepare")


def test_a_shard_of_noise_is_told_when_it_is_read(plan, tmp_path):
    """Its size is right, so it is found out only by the thread that reads ahead."""
    for shard in shards(plan):
        shard.write_bytes(os.urandom(shard.stat().st_size))
    with pytest.raises(UserError, match=r"words.*cannot be read .*prepare it again"):
        run(tiny.config(plan, steps=4), tmp_path / "run")


def test_a_half_written_source(plan, tmp_path):
    (plan.parent / "sums" / "dataset_info.json").unlink()
    refused(tiny.config(plan), tmp_path / "run", plan.parent / "sums", "no complete source")


def other_tokenizer():
    texts = tiny.documents("sums", 200, seed=5) + tiny.documents("words", 100, seed=5)
    return train_tokenizer(texts, tiny.VOCAB)


def write_words(plan, row_length, model):
    """Replaces the source `words` by one of another row length or tokenizer."""
    shutil.rmtree(plan.parent / "words")
    packer = Concat(row_length, model.bos_id, model.eos_id)
    ids = [np.array(model.encode(text), np.int32) for text in tiny.documents("words", 50)]
    rows = np.concatenate([packer.add(ids).rows, packer.finish().rows])
    info = SourceInfo(
        "words", "", row_length, model.vocab_size, model.bos_id, model.fingerprint, "concat", {}
    )
    batches = [Batch("train", rows), Batch("heldout", rows)]
    write_source(plan.parent / "words", info, {}, batches)


def test_rows_of_another_tokenizer(plan, tmp_path):
    write_words(plan, tiny.ROW, other_tokenizer())
    refused(tiny.config(plan), tmp_path / "run", "'words'", "another tokenizer", "tokenizer.model")


def test_rows_that_are_not_those_of_the_plan(plan, tmp_path):
    """Prepared again, from other text or with another length."""
    raw = json.loads(plan.read_text())
    raw["sources"][0]["rows"] = Plan.load(plan).sources[0].rows or 10_000
    plan.write_text(json.dumps(raw))
    write_words(plan, 2 * tiny.ROW, tiny.tokenizer())
    refused(tiny.config(plan), tmp_path / "run", "'words'", "the plan says 10,000", "again")


def test_a_source_too_small_for_one_row(plan, tmp_path):
    config = tiny.config(plan)
    config.row_length = config.model.max_length = 1 << 20
    refused(config, tmp_path / "run", "'words'", "too few for one of 1048576")


def test_a_run_longer_than_its_plan(plan, tmp_path):
    raw = json.loads(plan.read_text())
    raw["stages"][0]["tokens"] = 100 * tiny.ROW
    plan.write_text(json.dumps(raw))
    refused(tiny.config(plan), tmp_path / "run", "wants 192 rows", "ends after 100", "config.steps")


def test_a_tokenizer_that_was_exchanged(plan, tmp_path):
    other_tokenizer().write(plan.parent)
    refused(tiny.config(plan), tmp_path / "run", plan.parent / "tokenizer.model", "is not the")


@pytest.mark.parametrize("spoilt", ["", "{", "[]", '{"version": 1}', '{"version": 9}'])
def test_a_plan_that_is_none(plan, tmp_path, spoilt):
    plan.write_text(spoilt)
    refused(tiny.config(plan), tmp_path / "run", plan, "plan")


def weights(plan, *values):
    raw = json.loads(plan.read_text())
    raw["stages"][0]["weights"] = dict(zip(("words", "sums"), values, strict=True))
    plan.write_text(json.dumps(raw))


@pytest.mark.parametrize("values", [(0.7, 0.2), (0.7, 0.302), (1.2, -0.2)])
def test_weights_that_do_not_sum_to_one(plan, tmp_path, values):
    weights(plan, *values)
    refused(tiny.config(plan), tmp_path / "run", plan, "weight")


def test_weights_that_nearly_sum_to_one_are_renormalised_and_that_is_printed(plan, capsys):
    weights(plan, 0.7, 0.3005)
    found = Plan.load(plan).stages[0].weights
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert found["words"] == pytest.approx(0.7 / 1.0005)
    out = capsys.readouterr().out
    assert "1.0005" in out and "renormalised" in out and str(plan) in out


# --- The workdir ----------------------------------------------------------------------------------


def test_a_workdir_of_another_run(intact, workdir):
    config = tiny.config(intact, steps=4)
    config.optimizer.weight_decay = 0.2
    config.seed = 1
    for part in ("config.optimizer.weight_decay: 0.1 there, 0.2 here", "config.seed: 0 there"):
        refused(config, workdir, str(workdir), "another run", part, "--workdir")


def test_a_workdir_that_holds_something_else(intact, workdir, tmp_path):
    config = tiny.config(intact, steps=4)
    (workdir / "config.json").write_text('{"model_type": "llama"}\n')
    refused(config, workdir, workdir, "another run")
    (workdir / "config.json").write_text("{")
    refused(config, workdir, workdir / "config.json", "not JSON")
    (workdir / "config.json").unlink()
    refused(config, workdir, workdir, "no config.json")
    (tmp_path / "file").write_text("mine")
    refused(config, tmp_path / "file", tmp_path / "file", "is a file")


@pytest.mark.parametrize("spoilt", ["{", "[]", "null", '"config"', "[" * 100_000])
def test_a_workdir_whose_configuration_is_none(intact, workdir, spoilt):
    (workdir / "config.json").write_text(spoilt)
    refused(
        tiny.config(intact), workdir, workdir / "config.json", "is not JSON or no configuration"
    )


def test_a_refused_configuration_does_not_take_the_workdir(intact, tmp_path):
    config = tiny.config(intact, steps=4)
    config.schedule.warmup_steps = 4
    refused(config, tmp_path / "run", "warmup_steps")
    assert not (tmp_path / "run").exists()


def test_a_plan_that_changed_since_the_checkpoint(intact, workdir, plan):
    raw = json.loads(plan.read_text())
    raw["seed"] = 1
    plan.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"another plan .* differ in the seed\. Put that plan back"):
        run(tiny.config(plan, steps=4), workdir)


# --- Checkpoints ----------------------------------------------------------------------------------


def newest(workdir):
    return workdir / "checkpoints" / "4"


@pytest.mark.parametrize("part", ["meta", "params", "optimizer", "params/manifest.ocdbt"])
def test_a_checkpoint_without_a_part(intact, workdir, part):
    target = newest(workdir) / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    refused(tiny.config(intact, steps=4), workdir, newest(workdir), "damaged", "move that folder")


def test_a_checkpoint_that_was_cut_short(intact, workdir, tmp_path):
    """As a program: nothing follows the sentence, though threads of Orbax are still reading."""
    for part in ("params", "optimizer"):
        for file in (newest(workdir) / part).rglob("d/*"):
            os.truncate(file, file.stat().st_size // 2)
    before = files(workdir)
    ended = finish(start_training(config_file(tmp_path, intact, steps=4), workdir))
    last = ended.err.splitlines()[-1]
    assert ended.status == 1
    assert last.startswith(f"error: the checkpoint {newest(workdir)} is damaged")
    assert "move that folder away to begin anew" in last and "Traceback" not in ended.err
    assert files(workdir) == before


def test_several_damaged_checkpoints_and_no_whole_one(intact, tmp_path):
    config = tiny.config(intact, steps=4)
    config.checkpoint.every = 2
    run(config, tmp_path / "run", stop_at=3)
    for step in (2, 3):
        (tmp_path / "run" / "checkpoints" / str(step) / "meta" / "metadata").unlink()
    refused(
        config, tmp_path / "run", "checkpoints/3 is damaged", "so are 1 more", "no other is left"
    )


def test_what_kills_leave_behind_is_cleared_away(intact, workdir):
    """A half-written checkpoint is no checkpoint; a half-deleted old one hinders nobody."""
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "4", folder / "8.orbax-checkpoint-tmp")
    shutil.copytree(folder / "4", folder / "2")
    for part in ("params", "_CHECKPOINT_METADATA", "commit_success.txt"):
        shutil.rmtree(folder / "2" / part, ignore_errors=True)
        (folder / "2" / part).unlink(missing_ok=True)
    assert int(run(tiny.config(intact, steps=4), workdir).step) == 4
    assert not (folder / "8.orbax-checkpoint-tmp").exists()


def test_a_checkpoint_of_another_network(intact, workdir, tmp_path):
    config = tiny.config(intact, steps=4)
    config.model.rope_theta = 20_000.0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config.to_dict()))
    shutil.copytree(workdir / "checkpoints", tmp_path / "other" / "checkpoints")
    before = files(tmp_path / "other" / "checkpoints")
    with pytest.raises(
        UserError, match=r"another network \(model.rope_theta: 10000.0 there, 20000"
    ):
        run(config, tmp_path / "other")
    assert files(tmp_path / "other" / "checkpoints") == before


# --- The disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_checkpoints(intact, small_disk, tmp_path):
    """As a program: one sentence, a non-zero exit; with room again the same command goes on."""
    config = config_file(tmp_path, intact, steps=4, checkpoint__every=1, checkpoint__keep=9)
    finish(start_training(config, tmp_path / "roomy"))
    size = sum(map(len, files(tmp_path / "roomy" / "checkpoints" / "4").values()))
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * ((1 << 20) - 2 * size))
    ended = finish(start_training(config, small_disk / "run"))
    last = ended.err.splitlines()[-1]
    assert ended.status == 1
    assert last.startswith("error: ") and str(small_disk) in last
    assert "Traceback" not in ended.err
    ballast.unlink()
    (tmp_path / "again").mkdir()  # with fewer checkpoints to keep, for which there is room
    config = config_file(tmp_path / "again", intact, steps=4)
    assert finish(start_training(config, small_disk / "run")).status == 0
    found, whole = (load_model(path).params for path in (small_disk / "run", tmp_path / "roomy"))
    assert bits(found) == bits(whole)


def test_a_full_disk_under_the_metrics(intact, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    config = config_file(tmp_path, intact)
    config_json = json.dumps(tiny.config(intact).to_dict())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config_json)
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    ended = program(TRAIN, f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert ended.status == 1
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ") and "No space left" in last and str(tmp_path / "run") in last
    assert "Traceback" not in ended.err


def test_a_workdir_that_may_not_be_written(intact, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o500)
    if os.access(tmp_path / "run", os.W_OK):
        pytest.skip("root may write anywhere")
    ended = program(
        TRAIN, f"--config={config_file(tmp_path, intact)}", f"--workdir={tmp_path / 'run'}"
    )
    last = ended.err.splitlines()[-1]
    assert ended.status == 1
    assert re.match("error: .*permission", last) and str(tmp_path / "run") in last


# --- Functions of a user's own --------------------------------------------------------------------


def test_an_argument_that_the_function_does_not_take(intact, tmp_path):
    config = tiny.config(intact)
    with config.unlocked():
        config.optimizer = ConfigDict({**config.optimizer, "beta3": 0.1})
    parts = ("config.optimizer.beta3", "mobilellm_jax.training.optimizer:adamw", "weight_decay")
    refused(config, tmp_path / "run", *parts)


def test_an_argument_that_the_function_needs(intact, tmp_path):
    config = tiny.config(intact)
    with config.unlocked():
        del config.optimizer["clip"]
    refused(config, tmp_path / "run", "config.optimizer", "clip")


def test_a_mesh_that_does_not_fit(intact, tmp_path):
    config = tiny.config(intact)
    config.mesh.fsdp = 3
    refused(config, tmp_path / "run", "fsdp=3", "8 devices", devices=jax.devices())
