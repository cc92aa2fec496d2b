"""Networks exported with `convert --to=torch`, computed by the code published with MobileLLM.

That code needs transformers 4.41 and has a non-commercial license, so it is fetched beside this:

    git clone https://github.com/facebookresearch/MobileLLM OFFICIAL
    python -m venv OTHER
    OTHER/bin/pip install torch transformers==4.41.2 sentencepiece
    python -m benchmarks.official_mobilellm --code=OFFICIAL --python=OTHER/bin/python

Printed: the largest difference between its logits and ours for a plain and a layer-shared network of
random weights, without a KV cache and with one. With its cache the second pass over a shared block
reads the keys of the first, so there ours is computed with `ls_kv="first_pass"`.
"""

import dataclasses
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from mobilellm_jax.data.embedded import topics
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.interop import official_torch
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.presets import preset, shared

CHECK = """
import sys
import numpy as np, torch, transformers
sys.path.insert(0, sys.argv[2])
from utils.modeling_llama import LlamaForCausalLM

ours = np.load(f"{sys.argv[1]}/ours.npz")
ids = torch.tensor(ours["ids"])
print("transformers", transformers.__version__)
for folder, cached, name in (
    ("plain", False, "plain"), ("plain", True, "plain"),
    ("shared", False, "fresh"), ("shared", True, "first_pass"),
):
    path = f"{sys.argv[1]}/{folder}"
    model = LlamaForCausalLM.from_pretrained(path).eval()
    state = torch.load(f"{path}/pytorch_model.bin", weights_only=True)
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        theirs = model(ids, use_cache=cached).logits.numpy()
    error = np.abs(theirs - ours[name]).max()
    print(f"{folder}, use_cache={cached}, against {name}: {error:.1e} (std {ours[name].std():.2f})")
"""


def main(_: list[str]) -> None:
    """Exports, computes here, and has the other Python compute there."""
    args = flags.FLAGS
    plain = preset(args.model)
    networks = {
        "plain": plain,
        "fresh": shared(plain),
        "first_pass": dataclasses.replace(shared(plain), ls_kv="first_pass"),
    }
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (
            rng.uniform(0.5, 1.5, leaf.shape)
            if leaf.ndim < 3 and leaf.shape[-1] == plain.width and leaf.shape[0] != plain.vocab_size
            else rng.normal(0, plain.init_std, leaf.shape)
        ).astype(np.float32),
        transformer.shapes(plain),
    )
    tokenizer = train_tokenizer(list(topics().values()), 1000)
    ids_BT = rng.integers(3, plain.vocab_size, size=(1, 128))

    @jax.jit
    def logits(params: transformer.Params) -> dict[str, jax.Array]:
        return {
            name: transformer.logits(params, model, transformer.apply(params, model, ids_BT))
            for name, model in networks.items()
        }

    with tempfile.TemporaryDirectory() as directory:
        for folder, name in (("plain", "plain"), ("shared", "fresh")):
            official_torch.export(flat(params), networks[name], tokenizer, Path(directory) / folder)
        np.savez(Path(directory) / "ours.npz", ids=ids_BT, **jax.device_get(logits(params)))
        subprocess.run([args.python, "-c", CHECK, directory, args.code], check=True)


if __name__ == "__main__":
    flags.DEFINE_string("code", None, "A clone of github.com/facebookresearch/MobileLLM.")
    flags.DEFINE_string("python", None, "A Python with torch and transformers 4.41.")
    flags.DEFINE_string("model", "mobilellm-125m", "A preset without layer sharing.")
    flags.mark_flags_as_required(["code", "python"])
    app.run(main)
