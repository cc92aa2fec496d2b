r"""All six stages of MobileLLM-R1 in small on real corpora, and what each did to every capability.

    python -m benchmarks.recipe --corpora=FOLDER --gsm8k=FOLDER/gsm8k.jsonl.gz --out=runs/recipe

CORPORA holds math_stacks, prose_peps, science_arxiv_sample, literature_shakespeare and
math_gsm8k_train as .jsonl.gz of {"id", "text"}. The network is that of
`configs/mobilellm_r1.py:tiny`, its stages are longer here (`STAGES`):

    pretrain1      all sources alike
    (influence)    the benefit of each source to the capabilities, by DataInf at three checkpoints
    pretrain2      the mixture that follows from it
    midtrain1      the same, from a larger teacher that has read more
    midtrain2      half of it mathematics, likewise
    sft_general    dialogues that call functions (mobilellm_jax.api_dialogues)
    sft_reasoning  the training set of GSM8K as conversations

After every stage: bits per byte of the held-out rows of each source and of the answers in held-out
conversations, GSM8K's test problems and dialogues that call functions. Each step is a program of the
project, printed before it runs; started again it goes on. OUT gets results.md, curves.html and curves.svg.
"""

import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from data_mixing import drawing
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.tables import aligned

SOURCES = {
    "math": "math_stacks",
    "problems": "math_gsm8k_train",
    "technical": "prose_peps",
    "science": "science_arxiv_sample",
    "literature": "literature_shakespeare",
}
CAPABILITIES = {"math": "math,problems", "knowledge": "technical,science", "language": "literature"}
# Steps of each stage at --scale=1, of 1,024 tokens each but the last (2,048).
STAGES = {
    "pretrain1": 1500,
    "pretrain2": 1500,
    "midtrain1": 500,
    "midtrain2": 500,
    "sft_general": 500,
    "sft_reasoning": 600,
}
TEACHER = 8000  # it must know more than the student: a deeper one learns slower
HELDOUT = "--heldout=0.05"


def program(out: Path, module: str, *arguments: str) -> None:
    """Runs a program of the project in `out`, and says so."""
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=out, check=True, env=environment)


def prepare(args: Any, out: Path) -> None:
    """Rows of all sources, probes, conversations, and what is asked."""
    inputs = [f"--source={n}={args.corpora}/{file}.jsonl.gz" for n, file in SOURCES.items()]
    if not (out / "data" / "mixture.json").exists():
        tokenizer = ["--vocab_size=2048", "--chat_template=mobilellm_r1"]
        program(
            out,
            "mobilellm_jax.prepare",
            *inputs,
            *tokenizer,
            HELDOUT,
            "--row_length=256",
            "--weights=" + ",".join(f"{n}={1 / len(SOURCES)}" for n in SOURCES),
            "--out=data",
        )
    if not (out / "probes").exists():
        asked = [f"--capability={c}={sources}" for c, sources in CAPABILITIES.items()]
        program(
            out,
            "data_mixing.probes",
            *inputs,
            *asked,
            HELDOUT,
            "--per_source=100",
            "--out=probes",
        )
    if not (out / "api").exists():
        program(out, "mobilellm_jax.api_dialogues", "--out=api", "--train=600", "--test=60")
    chats = out / "gsm8k_train.jsonl"
    if not chats.exists():
        with gzip.open(
            Path(args.corpora) / f"{SOURCES['problems']}.jsonl.gz", "rt", encoding="utf-8"
        ) as file:
            written = [json.dumps({"messages": conversation(json.loads(line))}) for line in file]
        chats.write_text("\n".join(written) + "\n", encoding="utf-8")
    asked_folder = out / "asked"
    if not asked_folder.exists():
        asked_folder.mkdir()
        with gzip.open(args.gsm8k, "rt", encoding="utf-8") as file:
            problems = [json.loads(line) for line in file]
        lines = [
            json.dumps({"question": p["context"], "answer": final(p["chain_of_thought"])})
            for p in problems
        ]
        (asked_folder / "gsm8k.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (asked_folder / "api.jsonl").write_bytes((out / "api" / "test.jsonl").read_bytes())
    for name, file, row in (("api", "api/train.jsonl", 1024), ("gsm8k", chats.name, 2048)):
        folder = f"sft_{name}"
        if not (out / folder / "mixture.json").exists():
            program(
                out,
                "mobilellm_jax.prepare",
                f"--chat={name}={file}",
                "--tokenizer=data",
                f"--row_length={row}",
                HELDOUT,
                f"--out={folder}",
            )


def conversation(record: dict[str, str]) -> list[dict[str, str]]:
    """A problem of GSM8K, whose first line asks, and its solution with the answer in a box."""
    question, _, solution = record["text"].partition("\n")
    worked = re.sub(r"<<[^>]*>>", "", solution.split("####")[0]).strip()
    said = f"{worked}\nThe answer is \\boxed{{{final(solution)}}}."
    return [{"role": "user", "content": question}, {"role": "assistant", "content": said}]


def final(solution: str) -> str:
    """What stands behind `####`."""
    return solution.rpartition("####")[2].strip().replace(",", "")


def mix(args: Any, out: Path) -> None:
    """The mixtures of the later stages, from the benefit of sources at checkpoints of the first."""
    if not (out / "scores" / "scores.parquet").exists():
        program(
            out,
            "data_mixing.influence",
            "--plan=data/mixture.json",
            "--probes=probes",
            "--checkpoints=runs/pretrain1",
            "--steps=3",
            "--rows=48",
            "--train_rows=48",
            "--probe_rows=48",
            "--metrics=datainf",
            "--out=scores",
        )
    if not (out / "weights").exists():
        program(
            out,
            "data_mixing.weights",
            "--plan=data/mixture.json",
            "--method=influence=scores/scores.parquet:column=datainf,floor=0.1",
            f"--tokens={8 * args.scale * 1e6:.0f}",
            "--max_epochs=8",
            "--out=weights",
        )
    if not (out / "data" / "midtrain2.json").exists():
        plan, found = Plan.load(out / "data" / "mixture.json"), found_weights(out)
        shares = {n: 0.5 * found.get(n, 0.0) + 0.25 * (n in ("math", "problems")) for n in SOURCES}
        stage = dataclasses.replace(plan.stages[0], weights=shares)
        dataclasses.replace(plan, stages=(stage,)).save(out / "data" / "midtrain2.json")


def found_weights(out: Path) -> dict[str, float]:
    """What the influence gave each source."""
    plan = Plan.load(out / "weights" / "influence.json")
    return dict(zip(plan.names, plan.weights[0][0].tolist(), strict=True))


def train(args: Any, out: Path, name: str, before: str) -> None:
    """A stage, longer than in the configuration."""
    steps = round((STAGES.get(name) or TEACHER) * args.scale)
    plans = {
        "pretrain2": "weights/influence.json",
        "midtrain1": "weights/influence.json",
        "midtrain2": "data/midtrain2.json",
        "sft_general": "sft_api/mixture.json",
        "sft_reasoning": "sft_gsm8k/mixture.json",
    }
    changes = {
        "plan": plans.get(name, "data/mixture.json"),
        "steps": steps,
        "epochs": 0.0,
        "first_row": 0,
        "model.max_length": 2048,  # so that every stage can be asked everything
        "schedule.warmup_steps": steps // 20,
        "eval.every": max(steps // 10, 1),
        "eval.rows": 64,
        "checkpoint.every": max(steps // 6, 1),
        "checkpoint.keep": 8,
    }
    if before:
        changes["init_from"] = f"runs/{before}"
    if name.startswith("midtrain"):
        changes["teacher.path"] = "runs/teacher"
        changes["teacher.model.max_length"] = changes["model.max_length"]
    program(
        out,
        "mobilellm_jax.train",
        f"--config={Path(__file__).parents[1]}/configs/mobilellm_r1.py:tiny,{name}",
        *(f"--config.{key}={value}" for key, value in changes.items()),
        f"--workdir=runs/{name}",
    )


def judge(args: Any, out: Path, name: str) -> dict[str, float]:
    """What a stage's network can do: bits per byte by source, and scores."""
    folder = out / "judged" / name
    stores = "--stores=data/mixture.json,sft_api/mixture.json,sft_gsm8k/mixture.json"
    if not (folder / "results.json").exists():
        program(
            out,
            "mobilellm_jax.evaluate",
            f"--checkpoint=runs/{name}",
            stores,
            "--rows=16",
            "--tasks=gsm8k,api",
            "--data=asked",
            "--chat",
            f"--limit={args.limit}",
            f"--out={folder.relative_to(out)}",
        )
    lines = json.loads((folder / "results.json").read_text(encoding="utf-8"))["lines"]
    return {f"{line['label']} {line['metric'].split(',')[0]}": line["value"] for line in lines}


def curves(out: Path, stages: list[str]) -> list[str]:
    """A drawing for each stage: held-out bits per byte of its sources."""
    parts = []
    for stage in stages:
        text = (out / "runs" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [r for r in map(json.loads, text) if r["kind"] == "heldout"]
        names = [k for k in found[0] if k.startswith("bits_per_byte/")]
        series = {
            name.partition("/")[2]: drawing.Curve(
                np.array([r["step"] for r in found]), np.array([r[name] for r in found])
            )
            for name in names
        }
        parts.append(drawing.lines(stage, series, "step", "held-out bits per byte"))
    return parts


def one_picture(drawings: list[str]) -> str:
    """Drawings one below the other, as one SVG file."""
    heights = [float(re.search(r'viewBox="0 0 900 ([\d.]+)"', d)[1]) for d in drawings]
    above = np.cumsum([0, *heights])
    parts = [
        drawing.replace("<svg ", f'<svg y="{y:g}" height="{height:g}" ', 1)
        for drawing, y, height in zip(drawings, above[:-1], heights, strict=True)
    ]
    size = f'viewBox="0 0 900 {above[-1]:g}" width="900" height="{above[-1]:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def main(_: list[str]) -> None:
    args, out = flags.FLAGS, Path(flags.FLAGS.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    prepare(args, out)
    judged, before = {}, ""
    for name in STAGES:
        if name == "pretrain2":
            mix(args, out)
        if name == "midtrain1":
            train(args, out, "teacher", "")
            judged["teacher"] = judge(args, out, "teacher")
        train(args, out, name, before)
        judged[name], before = judge(args, out, name), name
    measures = list(judged["pretrain1"])
    cells = [["", *judged]]
    cells += [[m, *(f"{found[m]:.3f}" for found in judged.values())] for m in measures]
    table = aligned(cells, "<" + ">" * len(judged))
    shares = ", ".join(f"{n} {share:.1%}" for n, share in found_weights(out).items())
    (out / "results.md").write_text(
        f"```\n{table}\n```\n\nmixture by influence: {shares}\n", encoding="utf-8"
    )
    drawn = curves(out, list(judged))
    page = drawing.page("The recipe in small", [drawing.preformatted(table), *drawn])
    (out / "curves.html").write_text(page, encoding="utf-8")
    (out / "curves.svg").write_text(one_picture(drawn), encoding="utf-8")
    print(f"\n{table}\n\nmixture by influence: {shares}\n{out / 'curves.html'}")


if __name__ == "__main__":
    flags.DEFINE_string("corpora", None, "Folder with the corpora.", required=True)
    flags.DEFINE_string(
        "gsm8k", None, "GSM8K's test problems: context, chain_of_thought.", required=True
    )
    flags.DEFINE_string("out", None, "Folder of all that is made.", required=True)
    flags.DEFINE_float("scale", 1.0, "Times the steps of every stage.", lower_bound=0.001)
    flags.DEFINE_integer("limit", 60, "Problems and dialogues that are asked.", lower_bound=1)
    app.run(main)
