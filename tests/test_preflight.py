"""The program as a user starts it: what it says of a step, what it refuses, what it advises."""

import dataclasses
import functools
import json
import os
import re

import jax
import jax.experimental.topologies
import pytest
import tiny
from compilers import needs_libtpu
from runs import config_file, program

from mobilellm_jax import preflight
from mobilellm_jax.costs import report, search, step
from mobilellm_jax.costs.flops import count
from mobilellm_jax.costs.search import Point, lines_to_try
from mobilellm_jax.costs.step import make_programs, measure, needed_bytes, state_memory
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import flops_per_token
from mobilellm_jax.model.presets import preset
from mobilellm_jax.parallel import topologies
from mobilellm_jax.parallel.mesh import in_slices
from mobilellm_jax.parallel.topologies import topology_devices
from mobilellm_jax.training.config import base_config
from mobilellm_jax.training.setup import set_up

PROGRAM = "mobilellm_jax.preflight"
GIB = 2**30


@pytest.fixture(scope="module")
def costs():
    """Of the tiny step on eight devices."""
    config = tiny.config("unused")
    config.mesh.fsdp = 4
    return measure(make_programs(config, topology_devices("cpu:8"), 2), config)


def one_block():
    """A network as small as can be, for what no step of it is compiled for."""
    config = tiny.config("unused")
    config.model.stacks = [{**config.model.stacks[0], "layers": 1, "repeats": 1}]
    return config


def on_v5e(costs, peak):
    """The same, said of a chip with a data sheet and needing this many bytes."""
    memory = dataclasses.replace(costs.memory, capacity=15.75 * GIB, peak=peak)
    return dataclasses.replace(costs, device_kind="TPU v5 lite", memory=memory)


def test_the_step_is_the_one_that_training_runs(tmp_path):
    config = tiny.config(tiny.corpus(tmp_path))
    config.mesh.fsdp, config.microbatches = 4, 2
    run = set_up(config, jax.devices())
    made = make_programs(config, jax.devices(), preflight.sources(config))
    assert preflight.sources(config) == 2
    assert jax.tree.map(lambda x: (x.shape, x.sharding), made.abstract) == jax.tree.map(
        lambda x: (x.shape, x.sharding), run.abstract
    )
    sizes = jax.ShapeDtypeStruct((tiny.VOCAB,), "int32")
    with jax.set_mesh(run.mesh):
        real = jax.make_jaxpr(run.step)(run.abstract, run.abstract_batch)
        ours = made.step.trace(made.abstract, made.abstract_batch, sizes).jaxpr
        assert count(real) == count(ours)
        state = run.fresh()
    on_first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.params)]
    assert state_memory(made, None).weights == sum(on_first)


def test_what_is_printed_and_what_is_json(tmp_path, costs):
    config = config_file(tmp_path, tmp_path / "nowhere.json", mesh__fsdp=4)
    ended = program(PROGRAM, f"--config={config}", "--topology=cpu:8")
    assert ended.status == 0, ended.err
    for part in (
        "14 sources assumed",
        "mesh data 2 x fsdp 4",
        "temporaries",
        "all-gather",
        "x the",
    ):
        assert part in ended.out
    said = json.loads(program(PROGRAM, f"--config={config}", "--topology=cpu:8", "--json").out)
    tokens = 16 * tiny.ROW
    assert said["tokens"] == tokens and said["fits"] and said["advice"] == []
    assert said["model_matmul"] == tokens * flops_per_token(tiny.MODEL, 0) / 8
    assert said["matmul"] == pytest.approx(costs.matmul, rel=1e-4)  # of 14 sources, not 2
    assert said["memory"]["optimizer"] == pytest.approx(2 * said["memory"]["weights"], rel=1e-3)
    assert said["memory"]["peak"] > said["memory"]["arguments"] >= 3 * said["memory"]["weights"]


def test_what_the_compiler_cannot_print_is_told_without_its_stack(costs, monkeypatch, capfd):
    def as_text(self):
        os.write(2, b"*** Begin stack trace ***")
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    config = tiny.config("unused")
    config.mesh.fsdp = 4
    found = measure(make_programs(config, topology_devices("cpu:8"), 2), config)
    assert capfd.readouterr().err == ""
    assert found.traffic is found.exchanged is None
    assert (found.memory, found.matmul) == (costs.memory, costs.matmul)
    told = report.text(found, config, 0.4)
    assert "are not known: the compiler cannot print this program for cpu." in told


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--topology=v9:2x2"], ("--topology=v9:2x2", "v5p:8x8x16")),
        (["--topology=v5e"], ("--topology=v5e is no topology",)),
        (["--topology=v5e:0x2"], ("--topology=v5e:0x2 is no topology",)),
        (["--topology=v5e:16x32"], ("no slice of a v5e pod", "256 chips")),
        (["--topology=v5p:4x4"], ("no slice of a v5p pod", "3 axes")),
        (["--topology=h100:0"], ("--topology=h100:0 is no node", "1 to 8 GPUs")),
        (["--topology=h100:16"], ("--topology=h100:16 is no node", "--slices")),
        (["--topology=h100:2x2"], ("--topology=h100:2x2 is no topology",)),
        (["--topology=cpu:0"], ("--topology=cpu:0",)),
        (["--topology=cpu:8", "--slices=2"], ("--slices=2 of --topology=cpu:8", "TPU slices")),
        (["--slices=2"], ("--slices=2 of --topology=local", "nodes of GPUs")),
        (["--topology=cpu:900"], ("900 simulated devices", "8")),
        (["--topology=cpu:8", "--config.mesh.data=3"], ("data=3", "8 devices")),
        (["--topology=cpu:8", "--config.global_batch=12"], ("global_batch=12", "8 device")),
        (["--topology=cpu:8", "--utilisation=40"], ("--utilisation=40", "0.4")),
    ],
)
def test_bad_input_is_one_sentence_before_any_compilation(tmp_path, monkeypatch, arguments, parts):
    monkeypatch.setattr(step, "measure", lambda *_: pytest.fail("compiled"))
    config = config_file(tmp_path, tmp_path / "nowhere.json")
    ended = program(PROGRAM, f"--config={config}", *arguments)
    last = ended.err.splitlines()[-1]
    assert ended.status == 1 and last.startswith("error: ") and "Traceback" not in ended.err
    for part in parts:
        assert part in last


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install mobilellm-jax\[preflight\]"):
        topology_devices("v5e:2x2")


def test_without_the_cuda_plugin_it_says_what_to_install(monkeypatch):
    def unknown(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(jax.experimental.topologies, "get_topology_desc", unknown)
    with pytest.raises(UserError, match=r"h100:8 needs .* install mobilellm-jax\[cuda\]"):
        topology_devices("h100:8")


@needs_libtpu
def test_slices_are_devices_of_their_kind():
    for name, count_, kind in (("v5e:2x2", 4, "TPU v5 lite"), ("tpu7x:2x2x1", 8, "TPU7x")):
        devices = topology_devices(name)
        assert (len(devices), devices[0].device_kind) == (count_, kind)
    assert [len(one) for one in in_slices(topology_devices("v5e:2x2", 3))] == [4, 4, 4]
    with pytest.raises(UserError, match="v5e:3x5"):
        topology_devices("v5e:3x5")


MESSAGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (35.35G) exceeds available HBM (15.75G). HLO module: jit_train_step."
)


def test_what_the_compiler_refuses_is_a_number():
    assert needed_bytes(MESSAGE) == 35.35 * GIB
    assert needed_bytes("INTERNAL: something else (35.35G)") is None


def test_out_of_memory_is_an_answer_with_what_helps(costs):
    config = base_config(preset("mobilellm-r1-140m"))
    config.loss_chunks, config.global_batch = 2, 64
    full = on_v5e(costs, 20 * GIB)
    said = report.text(full, config, 0.4)
    assert "it does not fit: 4.25 GiB too much." in said
    advice = report.advice(full, config)
    for key in ("microbatches=2", "execution.remat=dots", "loss_chunks=4"):
        assert any(f"config.{key}" in line for line in advice), key
    config.execution.remat, config.microbatches = "full", 8
    assert not any(
        "remat" in line or "microbatches" in line for line in report.advice(full, config)
    )
    heavy = dataclasses.replace(full.memory, weights=4 * GIB, optimizer=8 * GIB)
    advice = report.advice(dataclasses.replace(full, memory=heavy), config)
    assert any(line.startswith("config.mesh.fsdp=") for line in advice)
    config.mesh.data = 8  # a key that would contradict
    advice = report.advice(
        dataclasses.replace(full, memory=heavy, mesh={"data": 12, "fsdp": 2}), config
    )
    [line] = [line for line in advice if line.startswith("config.mesh.fsdp=")]
    assert line.startswith("config.mesh.fsdp=24 with config.mesh.data=1: ")
    learns = dataclasses.replace(full.memory, teacher=12 * GIB)  # is split over all devices already
    advice = report.advice(dataclasses.replace(full, memory=learns), config)
    assert not any(line.startswith("config.mesh.fsdp=") for line in advice)
    assert report.advice(on_v5e(costs, 10 * GIB), config) == []


@pytest.mark.parametrize("use", ["adamw", "muon"])
def test_first_moments_in_bfloat16_give_back_what_is_said(costs, use):
    config = base_config(preset("mobilellm-350m"))
    config.steps, config.mesh.fsdp = 2000, 2
    config.optimizer.use = f"mobilellm_jax.training.optimizer:{use}"

    def advised(memory, missing):
        short = dataclasses.replace(memory, peak=memory.capacity + missing)
        found = report.advice(dataclasses.replace(costs, memory=short), config)
        return next((line for line in found if "mu_dtype=bfloat16" in line), None)

    before = state_memory(make_programs(config, jax.devices(), 2), 15.75 * GIB)
    config.optimizer.mu_dtype = "bfloat16"
    after = state_memory(make_programs(config, jax.devices(), 2), 15.75 * GIB)
    assert advised(before, GIB) is None  # they already are
    config.optimizer.mu_dtype = "float32"
    back = (before.optimizer - after.optimizer) / GIB
    assert back == pytest.approx(345_355_200 / 2 * 2 / GIB, rel=1e-3)  # a half, two bytes each
    assert f"{back:.2f} GiB back" in advised(before, GIB)
    assert advised(before, 100 * GIB) is None  # nothing that would help


def test_the_run_is_arithmetic(costs):
    config = tiny.config("unused", steps=1000)
    known = on_v5e(costs, GIB)
    run = report.run_figures(known, config, 0.5)
    flops = costs.tokens * flops_per_token(tiny.MODEL, tiny.ROW)
    assert run["tokens_per_second"] == pytest.approx(0.5 * 8 * 197e12 * costs.tokens / flops)
    assert run["chip_hours"] == pytest.approx(8 * 24 * run["days"])
    assert run["days"] == pytest.approx(1000 * flops / (0.5 * 8 * 197e12) / 86_400)
    slowest = max(known.seconds.values())
    assert run["attainable"] == pytest.approx(flops / 8 / 197e12 / slowest)
    half = dataclasses.replace(known, device_kind="TPU7x")  # two devices are a chip
    assert report.run_figures(half, config, 0.5)["chip_hours"] == pytest.approx(
        run["chip_hours"] * 197e12 / 2307e12
    )
    assert "a chip" in report.text(half, config, 0.5)
    assert report.run_figures(costs, config, 0.5) == {}  # of CPUs no peak is known


def pretended(costs, point, rows):
    """Costs by a formula: memory by the rows at once and by what is kept, time by what is not."""
    kept = {"none": 3, "dots": 2, "full": 1}[point.remat]
    peak = (1 + kept * rows / point.microbatches) * GIB
    work = costs.matmul * (1 + 1 / kept + point.microbatches / 100)
    return dataclasses.replace(on_v5e(costs, peak), matmul=work, traffic=0.0, exchanged=[])


def test_search_finds_the_fewest_microbatches_and_the_frontier(
    costs, tmp_path, monkeypatch, capsys
):
    config = one_block()
    config.global_batch = 8 * 16
    asked = []

    def fake(made, setting):
        point = Point(
            setting.mesh.fsdp, setting.execution.remat, setting.loss_chunks, setting.microbatches
        )
        asked.append(point)
        return pretended(costs, point, 16)

    monkeypatch.setattr(search, "measure", fake)
    arguments = config, "cpu:8", jax.devices(), 2, str(tmp_path)
    found = search.search(*arguments)
    stated = int(re.search(r"at most (\d+) compilations", capsys.readouterr().out)[1])
    assert 0 < len(asked) == len(set(asked)) <= stated
    for remat, fewest in (("none", 4), ("dots", 4), ("full", 2)):  # 1 + kept * 16 / k <= 15.75
        ks = [row["microbatches"] for row in found if row["remat"] == remat and row["fsdp"] == 1]
        assert min(ks) == fewest, remat
    assert all(row["peak"] <= 15.75 * GIB for row in found)
    best = [row for row in found if row["frontier"]]
    for row in found:
        beaten = any(b["peak"] <= row["peak"] and b["seconds"] <= row["seconds"] for b in best)
        assert beaten  # by itself, where it is on the frontier
    before = len(asked)
    assert search.search(*arguments) == found
    assert len(asked) == before  # all from the cache


def test_search_tries_what_the_batches_of_a_ramp_can_be_split_into(costs, monkeypatch, capsys):
    config = one_block()
    config.global_batch, config.batch_ramp = 32, ((24, 2000),)

    def fake(made, setting):  # so little memory that the most microbatches are asked about
        return pretended(costs, Point(1, "none", 1, setting.microbatches), 80)

    monkeypatch.setattr(search, "measure", fake)
    found = search.search(config, "cpu:8", jax.devices(), 2)
    assert {row["microbatches"] for row in found} <= {
        1,
        4,
    } and "x 2 numbers" in capsys.readouterr().out


def one_line_to_try(monkeypatch):
    monkeypatch.setattr(search, "lines_to_try", lambda *_: [Point(1, "none", 1, 1)])


def test_a_search_keeps_apart_what_the_name_of_a_topology_does_not(costs, tmp_path, monkeypatch):
    """`local` is another machine elsewhere."""
    one_line_to_try(monkeypatch)
    asked = []

    def fake(made, setting):
        asked.append(len(made.devices))
        return pretended(costs, Point(1, "none", 1, 1), 4)

    monkeypatch.setattr(search, "measure", fake)
    for count_ in (8, 4):
        arguments = one_block(), "local", jax.devices()[:count_], 2, str(tmp_path)
        search.search(*arguments)
    assert {*asked} == {8, 4}


def test_a_search_as_json_is_json(tmp_path, costs, monkeypatch):
    one_line_to_try(monkeypatch)
    fake = functools.partial(pretended, costs, Point(1, "none", 1, 1), 4)
    monkeypatch.setattr(search, "measure", lambda *_: fake())
    config = config_file(tmp_path, tmp_path / "nowhere.json")
    ended = program(PROGRAM, f"--config={config}", "--topology=cpu:8", "--search", "--json")
    assert json.loads(ended.out)[0]["microbatches"] and "* on the frontier" in ended.err


def test_search_leaves_out_what_arithmetic_rules_out(monkeypatch):
    config = base_config(preset("mobilellm-350m"))
    config.steps, config.global_batch, config.loss_chunks = 2000, 64, 8
    state = 4 * 345_355_200 * 4  # weights, two moments, gradients
    monkeypatch.setattr(search, "capacity", lambda device: 2.0 * state / 3)  # fits in quarters
    lines = lines_to_try(config, jax.devices(), 2)
    assert {line.fsdp for line in lines} == {4}
    assert {line.remat for line in lines} == {"none", "dots", "full"}
    monkeypatch.setattr(search, "capacity", lambda device: state / 16)
    with pytest.raises(UserError, match="take more devices"):
        lines_to_try(config, jax.devices(), 2)


@needs_libtpu
@pytest.mark.slow
def test_a_v5e_pod(tmp_path):
    asked = ["--config=configs/mobilellm.py:125m", "--topology=v5e:16x16"]
    asked += ["--config.global_batch=8192"]  # 32 rows on a device
    ended = program(PROGRAM, *asked)
    assert ended.status == 0 and "it does not fit" in ended.out
    assert "config.microbatches=" in ended.out and "Traceback" not in ended.err
    ended = program(PROGRAM, *asked, "--config.microbatches=8")
    assert "it fits" in ended.out and "roofline" in ended.out and "all-reduce" in ended.out
