"""Converts a checkpoint into what other programs load.

    python -m mobilellm_jax.convert --checkpoint=DIR --to=hf --out=DIR [--dtype=bfloat16]

`hf` is a folder that Hugging Face transformers loads as stock Llama, without code of ours. Neither
torch nor transformers is needed to write it.
"""

from absl import flags
from etils import epath

from mobilellm_jax import cli
from mobilellm_jax.interop import huggingface
from mobilellm_jax.training import checkpoint

_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{out}")
tokenizer = AutoTokenizer.from_pretrained("{out}")"""


def convert(directory: epath.PathLike, out: epath.PathLike, dtype: str = "float32") -> None:
    """Writes the model of a checkpoint as a Hugging Face folder and prints how to load it.

    Args:
      directory: a workdir, its `checkpoints` folder, or the folder of one step.
      out: the folder to make; it may exist if it is empty.
      dtype: of the weights in the file; float32, bfloat16 or float16.

    Raises:
      UserError: there is no checkpoint, or `huggingface.export` cannot write it.
    """
    loaded = checkpoint.load_model(directory)
    files = huggingface.export(loaded.params, loaded.model, loaded.tokenizer, out, dtype)
    print(f"step {loaded.step} of {directory} as a Hugging Face Llama in {dtype}:")
    for name in files:
        print(f"  {epath.Path(out) / name}")
    print(f"Load it with\n\n{_LOAD.format(out=out)}\n")


if __name__ == "__main__":
    # Here and not above, so that `convert` can be imported beside other programs with an --out.
    _CHECKPOINT = flags.DEFINE_string(
        "checkpoint", None, "A workdir, its checkpoints folder or one step's folder.", required=True
    )
    flags.DEFINE_enum("to", None, ["hf"], "hf: Hugging Face transformers.", required=True)
    _OUT = flags.DEFINE_string("out", None, "Folder to make.", required=True)
    _DTYPE = flags.DEFINE_enum("dtype", "float32", list(huggingface.DTYPES), "Of the weights.")
    cli.run(lambda: convert(_CHECKPOINT.value, _OUT.value, _DTYPE.value))
