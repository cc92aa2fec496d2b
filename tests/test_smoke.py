"""`make run` as a user types it: its parts are there and its quality is what it was."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest

from benchmarks import smoke
from mobilellm_jax.data.rows import open_rows
from mobilellm_jax.decoding.decoder import row_seeds, stream, to_draw
from mobilellm_jax.decoding.sampling import GREEDY
from mobilellm_jax.model import transformer
from mobilellm_jax.model.transformer import Execution
from mobilellm_jax.training.checkpoint import load_model
from mobilellm_jax.training.objectives import Network, next_token

STORED = Path(__file__).parent / "smoke_bits_per_byte.json"


def perplexities(directory, exported):
    """Of held-out documents: packed in rows in our network, each alone in the exported one."""
    torch = pytest.importorskip("torch")
    loaded = load_model(directory / "run")
    ends = loaded.tokenizer.bos_id, loaded.tokenizer.eos_id
    network = Network(loaded.model, Execution(), *ends)
    ours, theirs, targets = 0.0, 0.0, 0
    for source in ("code", "prose", "math"):
        rows_RT = open_rows(directory / "data" / source, "heldout").read(np.arange(16))
        losses = next_token(loaded.params, {"tokens": rows_RT}, network)
        ours += float((losses.nll_BT * losses.weight_BT).sum())
        targets += int(losses.weight_BT.sum())
        for row in rows_RT:
            borders = np.flatnonzero(row == network.bos_id)
            for document in np.split(row, borders):
                if len(document) > 1:
                    ids = torch.tensor(document[None], dtype=torch.long)
                    with torch.no_grad():
                        theirs += exported(ids, labels=ids).loss.item() * (len(document) - 1)
    return np.exp(ours / targets), np.exp(theirs / targets)


def continuations(checkpoint, heldout, exported, prompts=24, new_tokens=64):
    """Greedy continuations, ours with its cache, judged by the exported network.

    Where its two largest logits are nearer than 4 x the difference of the networks' logits, either
    token is right, and what follows cannot be compared.

    Returns:
      positions compared, positions too near to tell, and continuations that are equal to the end.
    """
    torch = pytest.importorskip("torch")
    loaded = load_model(checkpoint)
    rows_RT = open_rows(heldout, "heldout").read(np.arange(prompts))
    ids = [row[:32].tolist() for row in rows_RT]
    decoder, seeds = to_draw(loaded.params, loaded.model), row_seeds(0, prompts)
    drawn = list(stream(decoder, ids, new_tokens, GREEDY, seeds))
    whole_BT = np.concatenate([np.array(ids), np.stack(drawn, axis=1)], axis=1)
    hidden_BTD = transformer.apply(loaded.params, loaded.model, whole_BT)
    ours_BTV = np.asarray(transformer.logits(loaded.params, loaded.model, hidden_BTD))
    with torch.no_grad():
        theirs_BTV = exported(torch.tensor(whole_BT, dtype=torch.long)).logits.numpy()
    error = np.abs(ours_BTV - theirs_BTV).max()
    compared = near = equal = 0
    for tokens_T, logits_TV in zip(whole_BT, theirs_BTV, strict=True):
        for t in range(31, 31 + new_tokens):
            second, first = np.sort(logits_TV[t])[-2:]
            if first - second < 4 * error:
                near += 1
                break
            assert logits_TV[t].argmax() == tokens_T[t + 1]
            compared += 1
        else:
            equal += 1
    return compared, near, equal


@pytest.mark.slow
def test_make_run(tmp_path):
    smoke.run(tmp_path)
    for name in ("report.html", "hf/model.safetensors", "hf/tokenizer.json", "metrics.jsonl"):
        assert (tmp_path / "run" / name).exists()
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    out = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=8)
    assert len(tokenizer.decode(out[0])) > 4
    ours, theirs = perplexities(tmp_path, model)
    assert theirs == pytest.approx(ours, rel=1e-3)
    compared, near, equal = continuations(tmp_path / "run", tmp_path / "data" / "code", model)
    print(f"greedy: {compared} tokens equal, {equal} of 24 to the end, {near} ended in a near tie")
    assert compared >= 1000
    found = smoke.bits_per_byte(tmp_path)
    # Its text is the library of the Python that runs it, so each has figures of its own.
    stored = json.loads(STORED.read_text())
    version = ".".join(platform.python_version_tuple()[:2])
    if version not in stored:
        pytest.skip(f"no figures for Python {version} yet; this run gave {found}")
    # The same bits on a machine; another kind of processor rounds otherwise, and has figures too.
    assert any(found == pytest.approx(bits, rel=0.01) for bits in stored[version]), found
