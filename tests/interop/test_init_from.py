"""A new run starts at the weights it is given, and goes on as any other run."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from runs import bits, lines, rows_seen, run
from weights import random_leaves, said

from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import huggingface
from mobilellm_jax.interop.stored import open_model, write_checkpoint
from mobilellm_jax.leaves import nested
from mobilellm_jax.model.config import RopeScaling, Stack
from mobilellm_jax.train import train
from mobilellm_jax.training.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same network as folders of Hugging Face and as checkpoints, in two dtypes."""
    out = tmp_path_factory.mktemp("out")
    for dtype in ("float32", "bfloat16"):
        leaves = random_leaves(tiny.MODEL, dtype, std=0.02)
        huggingface.export(leaves, tiny.MODEL, tiny.tokenizer(), out / f"hf {dtype}")
        write_checkpoint(open_model(out / f"hf {dtype}"), out / f"checkpoint {dtype}")
    return out


def config(plan, init_from, steps=6, **model):
    c = tiny.config(plan, steps)
    c.init_from = str(init_from)
    for key, value in model.items():
        c.model[key] = value
    return c


def expected(dtype):
    leaves = random_leaves(tiny.MODEL, dtype, std=0.02)
    return bits(nested({path: leaf.astype(np.float32) for path, leaf in leaves.items()}))


@pytest.mark.parametrize(
    "place, devices", [("hf float32", 1), ("checkpoint bfloat16", 1), ("hf bfloat16", 8)]
)
def test_it_starts_at_these_weights(place, devices, plan, places, tmp_path):
    """The first step's learning rate is zero: after it the weights are those it started at."""
    c = config(plan, places / place)
    c.mesh.fsdp = 4 if devices == 8 else 1
    state = run(c, tmp_path / "run", stop_at=1, devices=jax.devices()[:devices])
    assert bits(state.params) == expected(place.split()[1])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    assert int(state.step) == 1
    if devices == 8:
        assert state.params["embedding"].addressable_shards[0].data.shape == (tiny.VOCAB, 8)


def test_it_goes_on_where_a_run_of_ours_ended_with_a_fresh_optimizer(plan, tmp_path):
    first = run(tiny.config(plan, 6), tmp_path / "first")
    c = config(plan, tmp_path / "first")
    second = run(c, tmp_path / "second", stop_at=1)
    assert bits(second.params) == bits(first.params)
    seen = rows_seen(tmp_path / "second")
    assert seen == rows_seen(tmp_path / "first")[:1]  # the data begins anew
    moments = [m for m in jax.tree.leaves(second.opt_state) if m.shape == (tiny.VOCAB, 32)]
    old = [m for m in jax.tree.leaves(first.opt_state) if m.shape == (tiny.VOCAB, 32)]
    assert len(moments) == len(old) == 2
    # After one step the second moment is a twentieth of the squared gradient and nothing more.
    mean, square = sorted(moments, key=lambda m: float(m.min()))
    np.testing.assert_allclose(square / 0.05, (mean / 0.1) ** 2, rtol=1e-3, atol=1e-12)


@pytest.mark.slow
def test_it_is_recorded_and_a_resume_needs_it_no_more(plan, places, tmp_path):
    source = shutil.copytree(places / "hf float32", tmp_path / "source")
    whole = run(config(plan, source), tmp_path / "whole")
    run(config(plan, source), tmp_path / "run", stop_at=3)
    shutil.rmtree(source)
    resumed = run(config(plan, source), tmp_path / "run")
    assert bits(resumed) == bits(whole)
    assert rows_seen(tmp_path / "run") == rows_seen(tmp_path / "whole")
    origin = {"directory": str(source), "family": "llama", "step": 0}
    meta = load_model(tmp_path / "run").meta
    assert meta["init_from"] == origin and meta["config"]["init_from"] == str(source)
    starts = lines(tmp_path / "run", "start")
    assert sorted(starts) == [0, 3]
    assert all(start["init_from"] == origin for start in starts.values())


def test_another_start_is_another_run(plan, places, tmp_path):
    run(config(plan, places / "hf float32"), tmp_path / "run", stop_at=1)
    for other in (places / "hf bfloat16", ""):
        with pytest.raises(UserError, match="belongs to another run .*config.init_from"):
            run(config(plan, other), tmp_path / "run")


def test_what_may_change_is_said(plan, places, tmp_path):
    scaling = dataclasses.asdict(RopeScaling(4.0, 1.0, 4.0, 64))
    c = config(plan, places / "hf float32", max_length=256, rope_theta=500.0, init_std=0.5)
    with c.unlocked():
        c.model.rope_scaling = scaling
    state, printed = said(train, c, tmp_path / "run", 1, jax.devices()[:1])
    assert bits(state.params) == expected("float32")
    assert "init_from: model.max_length was 128, is 256." in printed
    assert "init_from: model.rope_theta was 10000.0, is 500.0." in printed
    assert "init_from: model.init_std was 0.02, is 0.5." in printed
    assert "init_from: model.rope_scaling.factor was None, is 4.0." in printed
    c = config(plan, places / "hf float32")
    _, printed = said(train, c, tmp_path / "same", 1, jax.devices()[:1])
    assert "init_from:" not in printed and f"starting at the weights of {places}" in printed


def stacks(**changes):
    return [dataclasses.asdict(dataclasses.replace(tiny.MODEL.stacks[0], **changes))]


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"vocab_size": 328}, r"embedding is \[320, 32\] there and \[328, 32\] here"),
        ({"tied": False}, r"head is missing there and \[32, 320\] here"),
        ({"stacks": stacks(layers=3)}, r"stack_0/\S+ is \[2, .*\] there and \[3, .*\] here"),
        ({"stacks": stacks(mlp_width=64)}, r"stack_0/mlp/down is \[2, 48, 32\] there"),
        ({"stacks": stacks(layers=1) * 2}, "stack_0/"),
        ({"mlp": "relu"}, r"stack_0/mlp/gate is \[2, 32, 48\] there and missing here"),
        ({"qkv_bias": True}, r"stack_0/attention/key_bias is missing there"),
        ({"norm_eps": 1e-3}, "model.norm_eps is 1e-05 there and 0.001 here; only max_length"),
        ({"qk_norm": "unit"}, "model.qk_norm is 'none' there and 'unit' here"),
        ({"stacks": stacks(repeats=1)}, r"model.stacks.0.repeats is 2 there and 1 here"),
        ({"stacks": stacks(order="reverse")}, "model.stacks.0.order is 'immediate' there"),
        ({"stacks": stacks(rope=False)}, "model.stacks.0.rope is True there"),
        ({"ls_kv": "first_pass"}, "model.ls_kv is 'fresh' there"),
    ],
    ids=str,
)
def test_another_network_is_refused_before_anything_is_written(
    changes, word, plan, places, tmp_path
):
    c = config(plan, places / "hf float32")
    with c.unlocked():
        c.model.update(changes)
    with pytest.raises(UserError, match=word):
        run(c, tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_another_tokenizer_is_refused_and_none_is_accepted(plan, places, tmp_path):
    folder = shutil.copytree(places / "hf float32", tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    train_tokenizer(tiny.documents("words", 400), 300).write(folder)
    with pytest.raises(UserError, match=r"has another tokenizer .*prepare .*--tokenizer=.*/hf\."):
        run(config(plan, folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (folder / "tokenizer.model").unlink()
    state = run(config(plan, folder), tmp_path / "run", stop_at=1)
    assert bits(state.params) == expected("float32")


def test_where_there_is_nothing_to_start_at_a_sentence_says_so(plan, tmp_path):
    with pytest.raises(UserError, match="no checkpoint in .*nowhere"):
        run(config(plan, tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_from_before_these_keys_existed_goes_on(plan, tmp_path):
    """Neither init_from nor the newer keys of the network stand in its files."""
    whole = run(tiny.config(plan, 6), tmp_path / "whole")
    run(tiny.config(plan, 6), tmp_path / "run", stop_at=3)
    checkpoint = tmp_path / "run/checkpoints/3/meta/metadata"
    for path in (tmp_path / "run/config.json", checkpoint):
        raw = json.loads(path.read_text())
        c = raw["config"] if path == checkpoint else raw
        for key in ("init_from", "init_state", "tokens", "batch_ramp", "skip", "profile"):
            del c[key]
        del c["optimizer"]["mu_dtype"]
        for key in ("rope_scaling", "mlp", "qkv_bias", "ls_kv"):
            del c["model"][key]
        for stack in c["model"]["stacks"]:
            del stack["order"], stack["rope"]
        path.write_text(json.dumps(raw))
    assert bits(run(tiny.config(plan, 6), tmp_path / "run")) == bits(whole)
    c = tiny.config(plan, 6)
    c.model.stacks = [dataclasses.asdict(Stack(2, 4, 2, 48, 2, "reverse"))]
    with pytest.raises(UserError, match="belongs to another run .*order"):
        run(c, tmp_path / "run")
