"""Our trainer against an independent one: Hugging Face Llama and torch's AdamW on the same rows."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
import tiny

from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.interop import huggingface
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.train import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS = 50
PEAK, WARMUP, FLOOR = 1e-2, 10, 0.1
SHARED = tiny.MODEL
PLAIN = dataclasses.replace(SHARED, tied=False, stacks=(Stack(3, 4, 2, 48),))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the torch trainer does; the defaults are what ours is configured to do."""

    betas: tuple[float, float] = (0.9, 0.95)
    decay_norms: bool = False
    clip: float = 1.0
    floor: float = FLOOR
    separate_documents: bool = True
    learn_bos: bool = False
    share: bool = True


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@functools.cache
def configuration(plan, model):
    c = tiny.config(plan, STEPS)
    c.model = model.to_dict()
    c.schedule.peak, c.schedule.warmup_steps, c.schedule.floor = PEAK, WARMUP, FLOOR
    c.eval.every = c.checkpoint.every = c.log_every = STEPS
    if model is PLAIN:  # the other ways through the step
        c.microbatches, c.loss_chunks = 2, 4
    return c


def our_losses(plan, model, workdir):
    train(configuration(plan, model), workdir, devices=tiny.one_device())
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if line["kind"] == "train"])


def exported(plan, model, directory):
    """Step 0 of the run as a Hugging Face folder."""
    config = configuration(plan, model)
    init = jax.jit(
        lambda: transformer.init(ModelConfig.from_dict(config.model), jax.random.key(config.seed))
    )
    huggingface.export(flat(init()), model, tiny.tokenizer(), directory)
    return directory


def learning_rate(step, floor):
    if step < WARMUP:
        return PEAK * step / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return floor * PEAK + (1 - floor) * PEAK * (1 + math.cos(math.pi * done)) / 2


def torch_losses(folder, model, rows, recipe=Recipe()):
    """Losses of 50 steps over rows [steps, B, T + 1], one by one, written without a look at our trainer."""
    torch.set_num_threads(1)  # the products are too small to share
    bos = tiny.tokenizer().bos_id
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if recipe.share:  # the export has unrolled the sharing
        (stack,) = model.stacks
        layers = llama.model.layers
        for layer in range(len(layers)):
            layers[layer] = layers[layer - layer % stack.repeats]
    matrices = [p for p in llama.parameters() if p.ndim > 1]
    norms = [p for p in llama.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": norms, "weight_decay": 0.1 if recipe.decay_norms else 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, eps=1e-8)
    for step, tokens in enumerate(torch.tensor(rows, dtype=torch.long)):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        documents = torch.cumsum(inputs == bos, dim=1)
        may_see = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).tril()
        if recipe.separate_documents:
            may_see = may_see & (documents[:, :, None] == documents[:, None, :])
        mask = may_see.expand(len(inputs), -1, -1)[:, None]
        logits = llama(inputs, attention_mask=mask, use_cache=False).logits
        ignored = torch.full_like(targets, -100)
        targets = targets if recipe.learn_bos else torch.where(targets == bos, ignored, targets)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.floor)
        optimizer.step()
        yield loss.item()


@pytest.fixture(
    scope="module",
    params=[SHARED, pytest.param(PLAIN, marks=pytest.mark.slow)],
    ids=["shared", "plain"],
)
def run(request, plan, tmp_path_factory):
    """Our losses, and what the other trainer needs: step 0 as a folder, the network, the rows."""
    model, directory = request.param, tmp_path_factory.mktemp("run")
    batch = configuration(plan, model).global_batch
    mixture = open_mixture(Plan.load(plan), tiny.ROW, tiny.VOCAB)
    rows = mixture.read(np.arange(STEPS * batch))["tokens"].reshape(STEPS, batch, -1)
    return (
        our_losses(plan, model, directory / "ours"),
        exported(plan, model, directory / "hf"),
        model,
        rows,
    )


def test_every_loss_of_fifty_steps_is_that_of_torch(run):
    ours, folder, model, rows = run
    theirs = np.array([*torch_losses(folder, model, rows)])
    assert ours.shape == theirs.shape == (STEPS,)
    assert ours[-1] < ours[0] - 1  # there was something to learn
    largest = np.abs(ours - theirs).max()
    print(f"largest difference of {STEPS} losses: {largest:.1e}")
    assert largest < 1e-3


@pytest.mark.parametrize(
    "other",
    [
        Recipe(betas=(0.9, 0.999)),
        Recipe(decay_norms=True),
        Recipe(clip=1e9),
        Recipe(floor=0.0),
        Recipe(separate_documents=False),
        Recipe(learn_bos=True),
        Recipe(share=False),
    ],
    ids=["betas", "decay_norms", "clip", "floor", "documents", "bos", "sharing"],
)
@pytest.mark.parametrize("run", [SHARED], ids=["shared"], indirect=True)
def test_the_comparison_would_see(run, other):
    """Each detail of the recipe moves some loss by more than the tolerance, so none could be wrong unseen."""
    ours, folder, model, rows = run
    theirs = torch_losses(folder, model, rows, other)
    assert any(abs(a - b) > 1e-3 for a, b in zip(ours, theirs, strict=False))
