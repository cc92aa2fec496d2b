r"""Takes networks in and out: between checkpoints of ours and the files of other programs.

    python -m mobilellm_jax.convert --from=hf --checkpoint=DIR --out=DIR
    python -m mobilellm_jax.convert --checkpoint=DIR --to=hf --out=DIR
    python -m mobilellm_jax.convert --inspect=DIR

--checkpoint is a workdir, a checkpoint or a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3, dense
Llama 4, MobileLLM); --from says which of them it must be. --to is one of

    checkpoint  a checkpoint of ours, for every program here (the default for a Hugging Face folder)
    hf          a folder that transformers loads without code of ours; shared blocks are unrolled, and
                blocks of different widths filled up with zeros
    hf-shared   a folder with the few lines of PyTorch that keep shared blocks once
    gguf        a file for llama.cpp and the programs built on it; shared blocks are unrolled, and blocks
                of different widths keep them (architecture deci), unless --architecture names one that
                has one width for all and more readers (llama): then they are filled up with zeros
    onnx        a folder for onnxruntime: a graph with a cache of keys and values, shared blocks once
    web         a folder with a page that chats without a network, in the browser of a phone; needs npm
    executorch  a folder for phones: a program for ExecuTorch's runners, shared blocks once
    torch       a folder for the code published with MobileLLM

Weights keep the dtype they are stored in unless --dtype names another. With --quantize=w8a8 (or parts of
it, w8a8:blocks) the network becomes one of products of integers of 8 bits: a checkpoint then computes as
they do, and hf and hf-shared hold integers, for transformers and vLLM. Nothing is overwritten.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import flags
from etils import epath

from mobilellm_jax import cli
from mobilellm_jax.data.embedded import topics
from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import (
    executorch,
    gguf,
    huggingface,
    inspection,
    official_torch,
    onnx,
    stored,
    web,
)
from mobilellm_jax.interop.perplexity import perplexity
from mobilellm_jax.interop.stored import StoredModel
from mobilellm_jax.leaves import DTYPES
from mobilellm_jax.model.config import LS_KVS, ModelConfig, parameter_count
from mobilellm_jax.model.padding import padded, widest
from mobilellm_jax.model.quantization import parts_of

SAMPLE = 30_000  # characters of Python's help topics: four windows, minutes for 125M on a CPU

FORMATS = ("checkpoint", "hf", "hf-shared", "gguf", "onnx", "web", "executorch", "torch")

_HF = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{out}"{more})
tokenizer = AutoTokenizer.from_pretrained("{out}")"""
_EXECUTORCH = """from executorch.extension.llm.custom_ops import custom_ops  # operators of the program
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
runner = TextLLMRunner("{out}/model.pte", "{out}/tokenizer.json")
runner.generate("Once upon a time", GenerationConfig(num_bos=1))"""
# Formats whose matrices have types of their own, the first where none is named.
QUANTIZED = {
    "gguf": ("f16", *(q for q in gguf.QUANTIZATIONS if q != "f16")),
    "onnx": tuple(onnx.QUANTIZATIONS),
    "web": web.QUANTIZATIONS,
    "executorch": executorch.QUANTIZATIONS,
}

LOADS = {  # what to type to use what was written
    "checkpoint": 'import mobilellm_jax\nmodel, params, tokenizer = mobilellm_jax.load("{out}")',
    "hf": _HF.replace("{more}", ""),
    "hf-shared": _HF.replace("{more}", ", trust_remote_code=True"),
    "gguf": 'llama-completion -no-cnv -m {out} -p "Once upon a time"\n'
    "llama-cli -m {out}  # to talk, if it has learnt a chat template",
    "onnx": 'import onnxruntime\nsession = onnxruntime.InferenceSession("{out}/onnx/model.onnx")',
    "web": "python -m http.server --directory {out}  # and http://localhost:8000 in a browser",
    "executorch": _EXECUTORCH,
    "torch": "bash eval.sh  # of the MobileLLM repository, with {out} as its input model",
}


def convert(
    source: StoredModel,
    to: str,
    out: epath.PathLike,
    *,
    dtype: str | None = None,
    architecture: str | None = None,
    quantization: str | None = None,
    cache_length: int | None = None,
) -> None:
    """Writes a network in another format and prints what was written and how to load it.

    Args:
      source: the network.
      to: one of `FORMATS`.
      out: the folder (for gguf the file) to make; a folder may exist if it is empty.
      dtype: of the weights, one of `leaves.DTYPES`; None keeps that of the source. Not for those of
        `QUANTIZED`.
      architecture: for hf and gguf, the one to write where there is a choice; None chooses.
      quantization: for those of `QUANTIZED`, of the matrices; None: the first there.
      cache_length: for executorch, tokens that the cache has room for; None: the network's `max_length`.

    Raises:
      UserError: the format cannot express the network or its tokenizer, or something is in the way.
    """
    if dtype is not None and to in QUANTIZED:
        raise UserError(f"--dtype={dtype} is not for {to}, which has --quantization: leave it out.")
    if quantization is not None and to not in QUANTIZED:
        raise UserError(
            f"--quantization={quantization} is for {', '.join(QUANTIZED)}, not for {to}: leave it out."
        )
    if architecture is not None and to not in ("hf", "gguf"):
        raise UserError(
            f"--architecture={architecture} is for hf and gguf, not for {to}: leave it out."
        )
    if cache_length is not None and to != "executorch":
        raise UserError(
            f"--cache_length={cache_length} is for executorch; the cache of {to} grows: leave it out."
        )
    leaves, model = source.leaves, source.model
    if widest(model) != model and _one_width(to, model, architecture):
        leaves, model = padded(leaves, model)
        there, here = parameter_count(source.model), parameter_count(model)
        print(
            f"note: its blocks differ in their widths, and {architecture or to} has one for all: filled up "
            f"with zeros, {there:,} parameters are {here:,}; hf-shared keeps their own."
        )
    arguments = leaves, model, source.needed_tokenizer, out
    kind = quantization or QUANTIZED.get(to, ("",))[0]
    if to == "checkpoint":
        stored.write_checkpoint(source, out, dtype)
    elif to == "gguf":
        for note in gguf.export(*arguments, kind, architecture=architecture):
            print(f"note: {note}")
    elif to == "onnx":
        onnx.export(*arguments, kind)
    elif to == "web":
        web.export(*arguments, kind)
    elif to == "executorch":
        print(f"compiling {model.depth} applications of blocks, seconds for each ...", flush=True)
        executorch.export(*arguments, kind, cache_length)
    elif to == "torch":
        official_torch.export(*arguments, dtype)
    else:
        family = "hf_shared" if to == "hf-shared" else architecture
        huggingface.export(*arguments, family, dtype, source.description)
        if parts_of(model.quantization):
            print(
                "note: its matrices are integers, for which transformers needs compressed-tensors."
            )
    print(f"{source.directory} as {to}:")
    path = epath.Path(out)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        print(f"  {file}")
    print(f"Load it with\n\n{LOADS[to].format(out=out)}\n")


def _one_width(to: str, model: ModelConfig, architecture: str | None) -> bool:
    """Whether all blocks have the same widths in what is written."""
    if to != "gguf":
        return to == "hf"
    chosen = architecture or next(iter(gguf.expressible(model)), "")
    return chosen not in gguf.ARCHITECTURES or gguf.ARCHITECTURES[chosen].uniform


def open_source(
    directory: epath.PathLike, kind: str | None, ls_kv: str | None, text: str
) -> StoredModel:
    """Opens what is to be converted; of an official layer-shared network, measures both readings.

    The files of the official MobileLLM-LS do not say whether a block's second pass has keys of its own, so
    the perplexity of a text under both is printed.

    Args:
      directory: see `stored.open_model`.
      kind: "checkpoint" or "hf", what it must be; None: either.
      ls_kv: one of `LS_KVS`; None: fresh, which is what the paper describes.
      text: to measure on, at least a few hundred tokens.

    Raises:
      UserError: there is no such network.
    """
    if kind and stored.is_folder(directory) != (kind == "hf"):
        raise UserError(f"--from={kind}, but {directory} is not of that kind.")
    source = stored.open_model(directory, ls_kv or "fresh")
    if source.family == "mobilellm" and any(stack.repeats > 1 for stack in source.model.stacks):
        print(f"measuring both readings of {directory} ...", flush=True)
        for name, value in perplexities(source, text).items():
            chosen = " (converted so)" if name == source.model.ls_kv else ""
            print(f"ls_kv={name}: perplexity {value:.3f}{chosen}")
    elif ls_kv:
        raise UserError(
            f"--ls_kv={ls_kv} is for layer-shared folders of the code published with MobileLLM; "
            f"{directory} says itself what its blocks read."
        )
    return source


def perplexities(source: StoredModel, text: str) -> Mapping[str, float]:
    """The perplexity of a text under each of `LS_KVS`, in windows of at most 2,048 tokens."""
    params, tokenizer = source.params(), source.needed_tokenizer
    window = min(source.model.max_length, 2048, 1 + len(tokenizer.encode(text)))
    return {
        ls_kv: perplexity(
            params, dataclasses.replace(source.model, ls_kv=ls_kv), tokenizer, text, window
        )
        for ls_kv in LS_KVS
    }


def main() -> None:
    """Runs one conversion, or the inspection."""
    args: Any = flags.FLAGS
    if args.inspect:
        print(inspection.inspect(args.inspect))
        return
    text = "".join(text_lines(args.text)) if args.text else ""
    text = text or "\n\n".join(topics().values())[:SAMPLE]
    source = open_source(args.checkpoint, args["from"].value, args.ls_kv, text)
    if args.quantize is not None:
        model = dataclasses.replace(source.model, quantization=args.quantize)
        source = dataclasses.replace(source, model=model)
    to = args.to or ("" if source.family == stored.CHECKPOINT else "checkpoint")
    if not to:
        raise UserError(f"--to is missing: one of {', '.join(FORMATS[1:])}.")
    convert(
        source,
        to,
        args.out,
        dtype=args.dtype,
        architecture=args.architecture,
        quantization=args.quantization,
        cache_length=args.cache_length,
    )


if __name__ == "__main__":
    # Here and not above, so that `convert` can be imported beside other programs with an --out.
    flags.DEFINE_string("checkpoint", None, "A workdir, a checkpoint or a Hugging Face folder.")
    flags.DEFINE_enum("from", None, ["checkpoint", "hf"], "What --checkpoint must be.")
    flags.DEFINE_enum("to", None, FORMATS, "Format to write.")
    flags.DEFINE_string("out", None, "Folder to make; for gguf the file.")
    flags.DEFINE_enum("dtype", None, list(DTYPES), "Of the weights; by default as they are stored.")
    flags.DEFINE_enum(
        "architecture",
        None,
        sorted({*huggingface.EXPORTS, *gguf.ARCHITECTURES} - {"hf_shared"}),
        "For hf: qwen3 (the default) or llama4_text for networks with QK-norm; for gguf: llama where blocks "
        "differ in their widths and deci (the default) cannot be read.",
    )
    flags.DEFINE_enum(
        "quantization",
        None,
        sorted({kind for kinds in QUANTIZED.values() for kind in kinds}),
        "Of the matrices; by default the first of "
        + "; of ".join(f"{to}'s {', '.join(kinds)}" for to, kinds in QUANTIZED.items())
        + ".",
    )
    flags.DEFINE_integer(
        "cache_length",
        None,
        "For executorch: tokens its cache has room for; by default what the network reads.",
        lower_bound=2,
    )
    flags.DEFINE_string(
        "quantize",
        None,
        "none, w8a8, or w8a8:PARTS of blocks, head, embedding, joined by +; as the checkpoint has it unless "
        "given. GGUF has quantizations of its own, see --quantization.",
    )
    flags.DEFINE_enum("ls_kv", None, LS_KVS, "For official MobileLLM-LS folders: see ModelConfig.")
    flags.DEFINE_string("text", "", "File for their perplexities; by default Python's help topics.")
    flags.DEFINE_string("inspect", "", "Only say what lies in this folder or GGUF file.")
    flags.register_multi_flags_validator(
        ["inspect", "checkpoint", "out"],
        lambda given: given["inspect"] or (given["checkpoint"] and given["out"]),
        "--checkpoint and --out are needed, or --inspect.",
    )
    cli.run(main)
