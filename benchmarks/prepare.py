r"""How fast text becomes stored rows, beside two libraries that tokenize text for training.

    python -m venv PEERS && PEERS/bin/pip install tokenizers==0.23.3 datasets 'datatrove[io]' orjson
    python -m benchmarks.prepare --peers=PEERS/bin/python

Every way reads one file of JSON lines (this Python's own library), tokenizes it with one tokenizer.json and
stores the ids:

  ours        `prepare` with one worker: packed rows in ArrayRecord, with the record of documents
  datasets    `load_dataset("json").map(...)` in batches, an Arrow file of ids
  datatrove   `JsonlReader` and `DocumentTokenizer`, a file of ids and one of document ends

each in a process of its own with one thread, taking turns. Printed are tokens per second of processor
time, which a busy machine hardly changes, and of the clock; imports do not count. A peer that is not
installed is left out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tokenizers
from absl import app, flags
from tqdm import tqdm

from mobilellm_jax.data.embedded import embedded_corpora

VOCAB = 32_000
# A way is what it imports and what is timed; `text`, `tokenizer` and `out` are paths. It ends with
# `count()`, how many tokens it has stored.
_FRAME = """
import os, sys, time
text, tokenizer, out = sys.argv[1:]
{imports}
began = time.perf_counter(), time.process_time()
{work}
print("RESULT", time.perf_counter() - began[0], time.process_time() - began[1], count())
"""
_WAYS = {
    "ours": (
        """
from mobilellm_jax.data import huggingface_tokenizer
from mobilellm_jax.data.corpora import FileCorpus
from mobilellm_jax.data.rows import read_info
from mobilellm_jax.prepare import prepare
""",
        """
prepare([FileCorpus("text", text)], out + "/rows", 2048, tokenizer=tokenizer, workers=1)
def count():
    return sum(split.tokens for split in read_info(out + "/rows/text").splits.values())
""",
    ),
    "datasets": (
        "import datasets, tokenizers",
        """
known = tokenizers.Tokenizer.from_file(tokenizer)
bos, eos = known.token_to_id("<bos>"), known.token_to_id("<eos>")
def encode(batch):
    found = known.encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"ids": [[bos, *each.ids, eos] for each in found]}
rows = datasets.load_dataset("json", data_files=text, split="train", cache_dir=out)
rows = rows.map(encode, batched=True, remove_columns=rows.column_names)
def count():
    return sum(len(row["ids"]) for row in rows)
""",
    ),
    "datatrove": (
        """
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
""",
        """
folder, name = os.path.split(text)
step = DocumentTokenizer(
    out + "/tokens", tokenizer_name_or_path=tokenizer, eos_token="<eos>", shuffle_documents=False
)
step.run(JsonlReader(folder, glob_pattern=name)())
def count():  # two bytes each
    files = [os.path.join(out, "tokens", f) for f in os.listdir(out + "/tokens") if f.endswith(".ds")]
    return sum(map(os.path.getsize, files)) // 2
""",
    ),
}


def write_inputs(folder: Path, copies: int = 1) -> tuple[Path, Path]:
    """Writes text.jsonl and a tokenizer.json, byte-level BPE that is trained on it; returns their paths."""
    texts = [text for corpus in embedded_corpora() for _, text in corpus.texts]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (folder / "text.jsonl").write_text(lines * copies, encoding="utf-8")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(ends), encoding="utf-8")
    return folder / "text.jsonl", folder / "tokenizer.json"


def measure(python: str, way: str, text: Path, tokenizer: Path) -> tuple[float, float, int]:
    """Seconds by the clock, seconds of processor time, tokens of one way in a process of `python`."""
    imports, work = _WAYS[way]
    one_thread = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [
                python,
                "-c",
                _FRAME.format(imports=imports, work=work),
                str(text),
                str(tokenizer),
                out,
            ],
            env=one_thread,
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stdout}\n{done.stderr}")
    _, clock, processor, tokens = done.stdout.splitlines()[-1].split()
    return float(clock), float(processor), int(tokens)


def installed(python: str, module: str) -> bool:
    """Whether that Python has the module."""
    return not subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode


def main(_: list[str]) -> None:
    pythons = {"ours": sys.executable}
    for peer in ("datasets", "datatrove"):
        if installed(_PEERS.value, peer):
            pythons[peer] = _PEERS.value
        else:
            print(f"{peer} is not installed for {_PEERS.value}: see --help for how to install it.")
    speeds: dict[str, list[tuple[float, float]]] = {way: [] for way in pythons}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        text, tokenizer = write_inputs(Path(folder), _COPIES.value)
        for _repeat in tqdm(range(_REPEATS.value), disable=not sys.stderr.isatty()):
            for way, python in pythons.items():
                clock, processor, counts[way] = measure(python, way, text, tokenizer)
                speeds[way].append((counts[way] / processor, counts[way] / clock))
        print(f"{text.stat().st_size / 1e6:.1f} MB of text, medians of {_REPEATS.value}:")
    for way, all_ in speeds.items():
        processor, clock = (statistics.median(s) for s in zip(*all_, strict=True))
        pairs = zip(speeds["ours"], all_, strict=True)  # one after the other on the same machine
        times = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
        print(
            f"{way:10} {counts[way]:>10,} tokens  {processor / 1e6:.3f}M/s of processor time  "
            f"{clock / 1e6:.3f}M/s by the clock  (ours is {times:.2f} x as fast)"
        )


if __name__ == "__main__":
    _REPEATS = flags.DEFINE_integer("repeats", 3, "Times to run each way.", lower_bound=1)
    _COPIES = flags.DEFINE_integer("copies", 2, "Of the text, which is 14 MB.", lower_bound=1)
    _PEERS = flags.DEFINE_string("peers", sys.executable, "The Python that has the peers.")
    app.run(main)
