"""Every configuration with every argument: it builds, fits together and has the published network."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from weights import random_leaves

from mobilellm_jax.data.plan import Plan, PlanSource, Stage
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack, flops_per_token, parameter_count
from mobilellm_jax.model.presets import COMPARED, PRESETS, preset
from mobilellm_jax.pruning.while_training import rehearsed, schedule_of
from mobilellm_jax.sweeps.description import load_sweep
from mobilellm_jax.training.checkpoint import write_model
from mobilellm_jax.training.config import check, configured, differences
from mobilellm_jax.training.length import length_of

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = {"125m": 124_635_456, "350m": 345_355_200, "600m": 603_188_352}
SIZES |= {"1b": 1_005_461_760, "1.5b": 1_511_188_800}
R1_SIZES = {"140m": 140_248_512, "360m": 359_431_168, "950m": 949_685_760}


def module(name):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", CONFIGS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def parameters(config):
    """Of the network that training would make."""
    model = ModelConfig.from_dict(config.model)
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def whole(config, devices=1):
    """Checks what training checks before it builds anything; the schedule."""
    check(config, devices)
    for key in ("objective", "optimizer"):
        configured(config[key], key)
    return configured(config.schedule, "schedule")(config.steps)


def test_smoke():
    config = module("smoke").get_config()
    whole(config)
    assert parameters(config) == 951_424


@pytest.mark.parametrize("size", SIZES)
def test_mobilellm(size):
    for options in ("", ",ls", ",explore", ",ls,explore"):
        config = module("mobilellm").get_config(size + options)
        schedule = whole(config, devices=32)
        tokens = config.steps * config.global_batch * config.row_length
        assert tokens == (251_658_240_000 if "explore" in options else 1_006_632_960_000)
        assert float(schedule(0)) == 0.0
        assert float(schedule(1000)) == pytest.approx(2e-3)
        assert float(schedule(config.steps)) == pytest.approx(2e-4)
        model = ModelConfig.from_dict(config.model)
        assert model.depth == preset(f"mobilellm-{size}").depth * (2 if ",ls" in options else 1)
        assert parameter_count(model) == SIZES[size]
    assert parameters(config) == SIZES[size]


def test_mobilellm_takes_every_preset_and_a_size_by_default():
    get_config = module("mobilellm").get_config
    assert get_config() == get_config("125m") == get_config("mobilellm-125m")
    assert get_config("125m,ls") == get_config("ls-125m")
    for name in (*PRESETS, *COMPARED):
        config = get_config(name)
        whole(config)
        assert ModelConfig.from_dict(config.model) == preset(name)


# Of the six stages (arXiv 2509.24945, table 2): tokens of a row and of a step, steps or epochs, peak
# and final learning rate, weight decay. Of SFT the paper's steps hold 512 and 1,024 conversations.
R1_STAGES = {
    "pretrain1": (2048, 4_194_304, 500_000, 4e-3, 4e-4, 0.1),
    "pretrain2": (2048, 4_194_304, 500_000, 4e-3, 4e-4, 0.1),
    "midtrain1": (4096, 2_097_152, 50_000, 3.6e-4, 0.0, 0.1),
    "midtrain2": (4096, 2_097_152, 50_000, 3.6e-4, 0.0, 0.1),
    "sft_general": (4096, None, 2, 5e-6, 0.0, 0.0),
    "sft_reasoning": (32_768, None, 4, 8e-5, 0.0, 0.0),
}
R1_TOKENS = {"pretrain": 2_097_152_000_000, "midtrain": 104_857_600_000}
R1_SAMPLES = {"sft_general": (866_000, 512), "sft_reasoning": (6_163_000, 1024)}
R1_WARMUP = {"pretrain1": 2000, "pretrain2": 2000, "midtrain1": 500, "midtrain2": 500}


def sft_steps(stage):
    """Of the paper: conversations, read as often as the epochs say, over those of a step."""
    conversations, step = R1_SAMPLES[stage]
    return R1_STAGES[stage][2] * conversations // step


def in_steps(config, steps):
    """A configuration whose length, in epochs of data that are not here, is set in steps."""
    if config.epochs:
        config.steps, config.epochs = steps, 0.0
    return config


@pytest.mark.parametrize("size, stage", [*itertools.product(R1_SIZES, R1_STAGES)])
def test_mobilellm_r1(size, stage):
    config = module("mobilellm_r1").get_config(f"{size},{stage}")
    row, tokens, length, peak, last, decay = R1_STAGES[stage]
    assert config.row_length == config.model.max_length == row
    assert (config.epochs or config.steps) == length
    sft = stage.startswith("sft")
    assert bool(config.epochs) == sft
    if not sft:
        assert config.global_batch * row == tokens
        assert config.steps * tokens == R1_TOKENS[stage[:-1]]
    steps = sft_steps(stage) if sft else length
    # Warm-ups of SFT are published as shares of the run.
    warmup = R1_WARMUP.get(stage) or {"sft_general": 0.03, "sft_reasoning": 0.1}[stage] * steps
    assert config.schedule.warmup_steps == pytest.approx(warmup, rel=0.02)
    config = in_steps(config, steps)
    check(config, 64)
    configured(config.optimizer, "optimizer")
    schedule = configured(config.schedule, "schedule")(steps)
    warmup = config.schedule.warmup_steps
    middle = (warmup + steps) // 2
    for at, exact in ((0, 0), (warmup // 2, peak / 2), (warmup, peak), (steps, last)):
        assert float(schedule(at)) == pytest.approx(exact, rel=1e-5), at
    assert float(schedule(middle)) == pytest.approx((peak + last) / 2, rel=1e-3)  # a line
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip) == (decay, 1.0)
    assert parameters(config) == R1_SIZES[size]


def test_the_stages_of_mobilellm_r1_follow_each_other():
    published = module("mobilellm_r1")
    assert published.STAGES == tuple(R1_STAGES)
    for size in published.SIZES:
        configs = {stage: published.get_config(f"{size},{stage}") for stage in R1_STAGES}
        for stage, config in configs.items():
            assert config.stage == stage
        chain = [*configs.values()]
        assert (chain[0].init_from, chain[0].init_stage) == ("", "")
        for one, other in itertools.pairwise(chain):
            assert other.init_stage == one.stage
            assert other.init_from == f"runs/r1-{size}-{one.stage}"
            # The networks are equal but for what a start may change.
            kept = [differences(one.model.to_dict(), other.model.to_dict())]
            assert {key for found in kept for key in found} <= {"max_length", "rope_theta"}
        thetas = [config.model.rope_theta for config in chain]
        assert thetas == [1e6] * 5 + [8e6]
        # The second stage of a kind begins where the plan's second stage does.
        prefix = "mobilellm_r1_tiny" if size == "tiny" else "mobilellm_r1"
        for kind in ("pretrain", "midtrain"):
            plan = Plan.load(CONFIGS / "plans" / f"{prefix}_{kind}.json")
            first, second = (configs[f"{kind}{number}"] for number in (1, 2))
            assert first.plan == second.plan
            assert first.first_row == 0
            assert second.first_row == first.steps * first.global_batch
            assert second.first_row * second.row_length == plan.stages[0].tokens


def test_mid_training_is_distilled_and_nothing_else_is():
    published = module("mobilellm_r1")
    for size in published.SIZES:
        for stage in R1_STAGES:
            config = published.get_config(f"{size},{stage}")
            objective = config.objective
            assert bool(config.teacher.path) == stage.startswith("midtrain")
            assert objective.use.endswith(":distillation") == stage.startswith("midtrain")
            if config.teacher.path:
                assert objective.temperature == 1.0
                assert objective.labels == objective.reverse == 0.0
                teacher = ModelConfig.from_dict(config.teacher.model)
                assert teacher.vocab_size == config.model.vocab_size
    taught = published.get_config("140m,midtrain1").teacher
    assert ModelConfig.from_dict(taught.model) == preset("llama-3.1-8b")
    teacher = published.get_config("tiny,teacher")
    told = published.get_config("tiny,midtrain1").teacher.model
    found = differences(teacher.model.to_dict(), ModelConfig.from_dict(told).to_dict())
    assert not found
    student = published.get_config("tiny,pretrain1")
    assert parameters(teacher) > 1.5 * parameters(student)
    assert not teacher.init_from and teacher.plan == student.plan


@pytest.mark.parametrize(
    "name, argument, part",
    [
        ("mobilellm", "126m", "one of 125m, 350m, 600m, 1b, 1.5b"),
        ("mobilellm", "125m,lsx", "any of ,ls, ,explore"),
        ("mobilellm", "", "names no network"),
        ("mobilellm_r1", "140m", "one of 140m, 360m, 950m, tiny, a comma, and one of pretrain1"),
        ("mobilellm_r1", "125m,pretrain1", "names no stage"),
        ("mobilellm_r1", "140m,pretrain1,more", "names no stage"),
        ("mobilellm_r1", "140m,teacher", "names no stage"),
    ],
)
def test_arguments_that_name_nothing(name, argument, part):
    with pytest.raises(UserError, match=part):
        module(name).get_config(argument)


def lasting(config, tmp_path, rows=4000):
    """The configuration on a plan of so many rows in two equal sources."""
    tokens = rows // 2 * config.row_length
    sources = tuple(PlanSource(name, name, rows // 2, tokens) for name in "ab")
    plan = Plan(sources, (Stage("train", None, {"a": 0.5, "b": 0.5}),), "tokenizer.model", "")
    plan.save(tmp_path / "mixture.json")
    config.plan = str(tmp_path / "mixture.json")
    return length_of(config)


@pytest.mark.parametrize("argument", ["smoke", "125m", "350m,ls"])
def test_api_calling(argument, tmp_path):
    """MobileLLM, section 3.4: four epochs, 2e-5 linearly to 0, weight decay 0.01."""
    config = module("api_calling").get_config(argument)
    assert config.init_from == f"runs/{argument.replace(',', '-')}"
    length = lasting(config, tmp_path)
    assert length.rows(length.steps) == 4 * 4000
    schedule = configured(config.schedule, "schedule")(length.steps)
    check(config, 1)
    rates = [float(schedule(length.steps * i // 4)) for i in range(5)]
    peak = 1e-3 if argument == "smoke" else 2e-5
    assert rates == pytest.approx([peak * (1 - i / 4) for i in range(5)])
    assert config.optimizer.weight_decay == 0.01
    with pytest.raises(UserError, match="names no network"):
        module("api_calling").get_config("12m")


def test_the_orders_of_fine_tuning_differ_in_data_and_start_alone(tmp_path):
    orders = module("sft_order")
    for size in ("950m", "tiny"):
        found = {row: orders.get_config(f"{size},{row}") for row in orders.ROWS}
        for row, config in found.items():
            other = differences(config.to_dict(), found["joint"].to_dict())
            rates = {"schedule.peak", "schedule.warmup_steps"} if row == "tulu" else set()
            assert set(other) <= {"plan", "init_from", *rates}
            length = lasting(config, tmp_path, 200_000)
            assert length.rows(length.steps) - 200_000 < config.global_batch
            check(config, 1)
            configured(config.schedule, "schedule")(length.steps)
        starts = {config.init_from for row, config in found.items() if row != "after_tulu"}
        assert starts == {f"runs/r1-{size}-midtrain2"}
        if size in R1_SIZES:
            published = preset(f"mobilellm-r1-{size}")
            model = ModelConfig.from_dict(found["joint"].model)
            same = {"max_length": published.max_length, "rope_theta": published.rope_theta}
            assert dataclasses.replace(model, **same) == published
    for wrong in ("950m", "950m,tulu_last", "1b,tulu"):
        with pytest.raises(UserError, match="names no run"):
            orders.get_config(wrong)


def test_plans_of_the_orders_read_every_source_once(tmp_path):
    orders = module("sft_order")
    sizes = dict(zip(("tulu", "math", "code", "science"), (600, 300, 80, 20), strict=True))
    sources = tuple(PlanSource(name, name, n, n * 1024) for name, n in sizes.items())
    whole = Plan(sources, (Stage("train", None, {"tulu": 1.0}),), "tokenizer.model", "")
    whole.save(tmp_path / "mixture.json")
    orders.write_plans(tmp_path)
    for row, names in orders.ROWS.items():
        config = orders.get_config(f"tiny,{row}")
        config.plan, rows = f"{tmp_path}/{row}.json", sum(sizes[name] for name in names)
        plan, length = Plan.load(config.plan), length_of(config)
        assert set(plan.names) == set(names) and length.rows(length.steps) == rows
        read = plan.read(rows * 1024) / [source.tokens for source in plan.sources]
        assert read == pytest.approx(np.ones(len(names)))
    with pytest.raises(UserError, match="tulu.json exists already"):
        orders.write_plans(tmp_path)
    plan = Plan.load(tmp_path / "math.json")
    (tmp_path / "other").mkdir()
    plan.save(tmp_path / "other" / "mixture.json")
    with pytest.raises(UserError, match="has no source code, science, tulu"):
        orders.write_plans(tmp_path / "other")


def test_the_ladder_compares_like_with_like(tmp_path):
    """Equal parameters and data in each table; equal FLOPs where the label says so."""
    sweep = load_sweep(f"{CONFIGS / 'ladder.py'}:{tmp_path}/mixture.json")
    configs = {name: row.config for name, row in sweep.rows.items()}
    models = {name: ModelConfig.from_dict(c.model) for name, c in configs.items()}
    for name, config in configs.items():
        whole(config)
        assert config.plan == f"{tmp_path}/mixture.json"
        assert config.global_batch == configs["gqa"].global_batch
        assert config.steps == configs["gqa"].steps or name.endswith(("flops", "long"))
        assert sweep.rows[name].values == sweep.rows["gqa"].values
    counts = {name: parameter_count(model) for name, model in models.items()}
    dropped = counts.pop("tied")
    assert max(counts.values()) < 1.01 * min(counts.values())
    assert dropped < min(counts.values())

    def flops(name):
        return configs[name].steps * flops_per_token(models[name], configs[name].row_length)

    assert flops("ls-flops") == pytest.approx(flops("gqa"), rel=2e-3)
    assert flops("ls") > 1.5 * flops("gqa")
    shared = {n: m.stacks[0] for n, m in models.items() if n.partition("-")[2] in ("2", "3", "4")}
    shared = {n: s for n, s in shared.items() if not n.startswith("depth")}
    passes = {(s.order, s.repeats) for s in shared.values()}
    assert passes == set(itertools.product(("immediate", "repeat_all", "reverse"), (2, 3, 4)))
    assert configs["depth-12-long"].steps == configs["depth-3-long"].steps == 4 * 720
    assert len(sweep.tables) == 4
    assert {line.row for t in sweep.tables for line in t.lines} == set(sweep.rows)


def test_the_optimizers_are_compared_in_all_else_alike(tmp_path):
    sweep = load_sweep(f"{CONFIGS / 'optimizers.py'}:{tmp_path}/mixture.json")
    adamw, muon = (sweep.rows[name] for name in ("adamw", "muon"))
    for row in (adamw, muon):
        whole(row.config)
    found = differences(adamw.config.to_dict(), muon.config.to_dict())
    assert set(found) == {"optimizer.use"} and adamw.values == muon.values


def test_rounding_is_all_that_eight_bits_compares(tmp_path):
    model = dataclasses.replace(tiny.MODEL, max_length=256)
    write_model(random_leaves(model), model, tiny.tokenizer(), {}, tmp_path / "source")
    sweep = load_sweep(f"{CONFIGS / 'eight_bits.py'}:{tmp_path}/source,{tmp_path}/mixture.json")
    floats, rounded = (sweep.rows[name] for name in ("floats", "rounded"))
    for config in (floats, rounded):
        whole(config)
        assert (config.init_from, config.plan) == (f"{tmp_path}/source", f"{tmp_path}/mixture.json")
    found = differences(floats.to_dict(), rounded.to_dict())
    assert set(found) == {"model.quantization"}


def test_distillation():
    """Table 16's networks, and the small study: what a teacher costs, and that all rows fit together."""
    made = module("distillation")
    for size, count in (("125m", 134_105_856), ("350m", SIZES["350m"])):
        alone, taught = (made.get_config(size + kd) for kd in ("", ",kd"))
        assert parameters(alone) == parameters(taught) == count
        assert alone.steps == taught.steps == 120_000
        found = differences(alone.to_dict(), taught.to_dict())
        assert {key.split(".")[0] for key in found} == {"objective", "teacher"}
        teacher = ModelConfig.from_dict(taught.teacher.model)
        assert parameter_count(teacher) == 6_738_415_616
        whole(taught)
    with pytest.raises(UserError, match="neither teacher nor one of 125m, 350m"):
        made.get_config("1b")
    sweep = load_sweep(f"{CONFIGS}/distillation.py")
    for config in sweep.rows.values():
        check(config, 1)
        configured(config.objective, "objective")
    steps = {name: config.steps for name, config in sweep.rows.items()}
    assert steps["labels-flops"] == round(2.193 * steps["labels"]) == round(2.193 * steps["kd"])
    whole(made.get_config("teacher"))


@pytest.mark.parametrize("run", ["350m", "600m", "1b", "qwen-0.5b", "deepseek", "small"])
def test_adapt_pruner(run):
    """Sources and targets as the authors count them, and every cut within reach of the strategy."""
    config = module("adapt_pruner").get_config(run if run != "small" else "small,pruned")
    whole(config)
    published = {"350m": SIZES["350m"], "qwen-0.5b": 494_032_768, "deepseek": 1_777_088_000}
    published |= {"600m": SIZES["600m"], "1b": SIZES["1b"]}
    assert parameters(config) == published.get(run, parameters(config))
    schedule = schedule_of(config, config.steps)
    strategy = configured(config.pruning.strategy, "pruning.strategy")
    rehearsed(ModelConfig.from_dict(config.model), strategy, schedule, "", smaller=None)
    cut = parameters(config) - np.array([parameters(config), *schedule.targets])
    if run != "small":  # "about 5 % at a time": 3 to 5 of the source
        assert (np.diff(cut) / parameters(config) < 0.05).all()


def test_adapt_pruner_says_what_there_is():
    for argument in ("125m", "8b", "8b,30", "350m,20"):
        with pytest.raises(UserError, match="350m, 600m, 1b.*8b,20"):
            module("adapt_pruner").get_config(argument)


def test_adapt_pruner_trains_on_what_is_left_of_llama():
    made = module("adapt_pruner")
    for share in (20, 40, 50, 60):
        config = made.get_config(f"8b,{share}")
        whole(config, devices=4)
        left = parameters(config) / 8_030_261_248
        assert 1 - share / 100 - 1e-4 < left <= 1 - share / 100
        assert not config.pruning.target and not config.init_from


EFFICIENT = {
    "134m": (361_821_120, 134),
    "469m": (1_711_376_384, 469),
    "1.1b": (1_711_376_384, 1100),
}


@pytest.mark.parametrize("size", EFFICIENT)
def test_efficientllm(size):
    """Sources and targets, 0.52B tokens before the first cut, and a stage that begins where one ends."""
    made = module("efficientllm")
    first, then = (made.get_config(f"{size},{stage}") for stage in ("prune", "continue"))
    for config in (first, then):
        check(config, 4)
        configured(config.schedule, "schedule")(length_of(config).steps)
    source, target = EFFICIENT[size]
    assert parameters(first) == source and first.pruning.target == target * 10**6
    assert 0.98 < parameters(then) / (target * 10**6) < 1.01
    assert first.pruning.begin * first.global_batch * first.row_length == 524_288_000
    schedule = schedule_of(first, first.steps)
    assert schedule.targets[-1] == target * 10**6 and schedule.steps[-1] < first.steps
    assert length_of(first).rows(first.steps) == then.first_row == length_of(then).rows(0)
    assert length_of(then).tokens >= {"1.1b": 320e9}.get(size, 500e9)


def test_efficientllms_cuts_follow_its_figure():
    """Parameters of the plotted run, by its shares of heads, MLP and stream, are those of the schedule."""
    config = module("efficientllm").get_config("469m,prune")
    schedule, step = schedule_of(config, config.steps), config.global_batch * config.row_length
    plotted = {5: (27, 7987, 2048), 10: (27, 7520, 2048), 20: (26, 6529, 2048)}
    plotted |= {30: (25, 5521, 2048), 40: (23, 4588, 2048), 50: (21, 3768, 1991)}
    plotted |= {60: (20, 3350, 1702), 70: (19, 3097, 1329)}
    for billions, (heads, mlp_width, width) in plotted.items():
        model = dataclasses.replace(
            preset("smollm-1.7b"), width=width, stacks=(Stack(24, heads, heads, mlp_width),)
        )
        done = np.searchsorted(schedule.steps, billions * 1e9 / step)
        assert abs(parameter_count(model) / schedule.targets[done] - 1) < 0.05, billions


def test_what_a_folder_holds_is_trained_on(tmp_path):
    """The network that pruning left, whatever its shape, and its weights."""
    left = dataclasses.replace(tiny.MODEL, stacks=(Stack(1, 4, 2, 9), Stack(1, 2, 1, 5)))
    write_model(random_leaves(left), left, tiny.tokenizer(), {}, tmp_path / "left")
    for name, argument in (("efficientllm", "469m,continue"), ("adapt_pruner", "8b,60")):
        config = module(name).get_config(f"{argument},{tmp_path}/left")
        assert ModelConfig.from_dict(config.model) == left
        assert config.init_from == f"{tmp_path}/left"


def test_efficientllm_says_what_there_is():
    for argument in ("350m,prune", "469m", "469m,train", "469m,prune,models/469m"):
        with pytest.raises(UserError, match="134m, 469m, 1.1b, and ,prune"):
            module("efficientllm").get_config(argument)


def test_the_study_of_pruning(tmp_path, monkeypatch):
    """Every arm is a run that can be, comes to half of the source, and costs what its table says."""
    made = module("pruning_study")
    monkeypatch.setattr(made, "FOLDER", str(tmp_path))
    small = dataclasses.replace(made.BY_HAND, dead_channels=False)
    for name in ("source", *made.ONE_SHOT):
        model = made.adapt_pruner.SMALL if name == "source" else small
        write_model(random_leaves(model), model, tiny.tokenizer(), {}, tmp_path / name)
    sweep = made.get_sweep("")
    source = parameter_count(made.adapt_pruner.SMALL)
    flops = {}
    for name, config in sweep.rows.items():
        check(config, 1)
        whole(config)
        schedule = schedule_of(config, config.steps)
        model = ModelConfig.from_dict(config.model)
        flops[name] = config.steps * flops_per_token(model, config.row_length)
        left = schedule.targets[-1] if schedule.targets else parameter_count(model)
        assert left <= source // 2 or name == "dense"
        assert config.first_row == 16_000 and bool(schedule.compactions) == (
            name.startswith(("efficient-a", "efficient-b", "cuts"))
        )
    taught = flops["distilled"] * (1 + flops["dense"] / 3 / flops["scratch-1"])
    assert abs(taught / flops["dense"] - 1) < 0.01
    assert made.get_config("source").steps == 4_000
    longer = made.get_sweep("longer,elsewhere").rows
    assert [c.steps for c in longer.values()] == [400 * n for n in (8, 16, 32, 64)]
    assert {c.plan for c in longer.values()} == {"elsewhere"}
    with pytest.raises(UserError, match="neither source nor one of dense, adapt"):
        made.get_config("adept")
