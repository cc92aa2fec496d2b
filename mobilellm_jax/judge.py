r"""Has answers graded by a model behind an OpenAI-compatible server: win rate, or ratings from 1 to 10.

    python -m mobilellm_jax.judge --instructions=alpaca_eval.json --reference=gpt4.json \
      --checkpoint=runs/sft --judge=http://localhost:8000/v1 --judge_model=NAME --out=runs/sft/wins
    python -m mobilellm_jax.judge --questions=question.jsonl --server=http://localhost:8001/v1 \
      --server_model=NAME --judge=https://api.openai.com/v1 --judge_model=NAME --out=ratings

--instructions are AlpacaEval's: each answer is compared with the reference's, in both orders.
--questions are MT-Bench's: they are asked turn after turn, and each answer is rated. Answers come from
a --checkpoint, a --server, or a file of --answers in AlpacaEval's or MT-Bench's format. --out keeps
them (answers.json, which AlpacaEval reads, or conversations.jsonl) with results.md, results.json and all
that was answered so far: a killed run goes on by the same command.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mobilellm_jax import cli
from mobilellm_jax.decoding.sampling import Sampling
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.answers import Answer, of_checkpoint, of_server, server_options
from mobilellm_jax.evaluation.chat_files import (
    Outputs,
    Question,
    Record,
    conversations_of,
    instruction_of,
    outputs_of,
    read_conversations,
    read_instructions,
    read_outputs,
    read_questions,
)
from mobilellm_jax.evaluation.endpoint import Endpoint, Message
from mobilellm_jax.evaluation.judge import (
    Ratings,
    WinRate,
    converse,
    rate,
    ratings,
    see_answered,
    win_rate,
)
from mobilellm_jax.evaluation.scores import Score, known
from mobilellm_jax.evaluation.server_flags import define_server, named_server, server_settings
from mobilellm_jax.files import replaced
from mobilellm_jax.interop.stored import load_model
from mobilellm_jax.parallel.compiled import keep_compiled
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.tables import markdown_table

ANSWERS, CONVERSATIONS, RESULTS = "answers.json", "conversations.jsonl", "results.json"
ANSWERED, JUDGED = "answers.cache.jsonl", "judge.cache.jsonl"


def compare(
    records: Sequence[Record], ours: Outputs, reference: Outputs, judge: Endpoint, out: Path
) -> tuple[str, dict[str, Any]]:
    """Writes answers, and has them compared with a reference's.

    Args:
      records: the instructions; see `read_instructions`.
      ours: an answer to each.
      reference: an answer to each.
      judge: who decides.
      out: folder.

    Returns:
      the table, and the results as plain values.

    Raises:
      UserError: see `win_rate`; or all our answers are empty.
    """
    answers = {text: ours.texts[text] for text in map(instruction_of, records)}
    _see_said(list(answers.values()))
    kept = outputs_of(records, list(answers.values()), ours.name)
    _write(out / ANSWERS, json.dumps(kept, indent=2))
    found = win_rate(answers, reference.texts, judge, cache=out / JUDGED)
    each = [
        {"instruction": instruction, "point": point}
        for instruction, point in zip(answers, found.points, strict=True)
    ]
    results = {"answers": ours.name, "reference": reference.name, "win_rate": _plain(found)}
    return win_table(found, ours.name, reference.name, judge.model), {**results, "each": each}


def grade(
    questions: Sequence[Question],
    name: str,
    conversations: Sequence[Sequence[Message]],
    judge: Endpoint,
    out: Path,
) -> tuple[str, dict[str, Any]]:
    """Writes conversations, and has them rated turn by turn.

    Args:
      questions: what was asked.
      name: of who answered.
      conversations: one for each question.
      judge: who rates.
      out: folder.

    Returns:
      the table, and the results as plain values.

    Raises:
      UserError: see `rate`; or all answers are empty.
    """
    _see_said([m["content"] for c in conversations for m in c if m["role"] == "assistant"])
    kept = conversations_of(questions, conversations, name)
    _write(out / CONVERSATIONS, "\n".join(map(json.dumps, kept)))
    found = rate(conversations, judge, cache=out / JUDGED)
    categories = by_category(questions, found)
    each = [
        {"question_id": question.id, "category": question.category, "ratings": values}
        for question, values in zip(questions, found.values, strict=True)
    ]
    results = {
        "answers": name,
        "ratings": _plain(found),
        "categories": {category: part and _plain(part) for category, part in categories.items()},
        "each": each,
    }
    title = f"Answers of {name}, rated by {judge.model}:"
    return f"{title}\n\n{ratings_table(found, categories)}", results


def by_category(questions: Sequence[Question], found: Ratings) -> dict[str, Ratings | None]:
    """Ratings of the questions of each category, in the order in which they come; None: unreadable."""
    values: dict[str, list[tuple[float | None, ...]]] = {}
    for question, of_one in zip(questions, found.values, strict=True):
        values.setdefault(question.category, []).append(of_one)
    return {
        category: ratings(part) if any(v is not None for turns in part for v in turns) else None
        for category, part in values.items()
    }


def win_table(found: WinRate, name: str, reference: str, judge: str) -> str:
    """A win rate in Markdown."""
    header = ["answers", "reference", "judge", "win rate", "standard error"]
    header += ["wins", "ties", "losses", "swayed", "unreadable", "characters", "reference's"]
    counts = (found.wins, found.ties, found.losses, found.swayed, found.unreadable)
    lengths = (f"{found.length:,.0f}", f"{found.reference_length:,.0f}")
    names = [name, reference, judge]
    row = [*names, *_cells(found.score, 4), *(f"{n:,}" for n in counts), *lengths]
    return markdown_table([header, row], "<<<" + ">" * (len(row) - 3))


def ratings_table(found: Ratings, categories: Mapping[str, Ratings | None]) -> str:
    """Ratings in Markdown: of all conversations, and of those of each category."""
    turns = len(found.turns)
    header = ["category", "conversations", "rating", "standard error"]
    for turn in range(turns):
        header += [f"turn {turn + 1}", "standard error"]
    rows = [[*header, "unreadable"]]
    named = [(name, part) for name, part in categories.items() if name]
    for name, part in [*named, ("all", found)]:
        if part is None:
            rows.append([name, *[""] * len(header[1:]), "all"])
            continue
        row = [name, f"{len(part.values):,}", *_cells(part.score, 2)]
        for turn in range(turns):
            row += _cells(part.turns[turn] if turn < len(part.turns) else None, 2)
        rows.append([*row, f"{part.unreadable:,}"])
    return markdown_table(rows, "<" + ">" * len(header))


def _cells(score: Score | None, digits: int) -> list[str]:
    """A mean and its standard error, each empty where there is none."""
    values = () if score is None else (score.mean, score.standard_error)
    shown = ["" if math.isnan(value) else f"{value:.{digits}f}" for value in values]
    return shown or ["", ""]


def _plain(found: WinRate | Ratings) -> dict[str, Any]:
    """Its figures as values that JSON knows."""
    figures = dataclasses.asdict(found).items()
    return known({key: value for key, value in figures if key not in ("points", "values")})


def _write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as unfinished:
        unfinished.write_text(text + "\n")


def _see_said(texts: Sequence[str]) -> None:
    if not any(text.strip() for text in texts):
        raise UserError(
            f"all {len(texts):,} answers are empty, so there is nothing to judge: does the network know "
            "its chat template?"
        )


def main() -> None:
    """See the module."""
    keep_compiled()
    args, out = flags.FLAGS, Path(flags.FLAGS.out)
    if (out / RESULTS).exists():
        raise UserError(f"--out={out} holds results already: name another folder.")
    asked = _one_of("instructions", "questions", what="what is asked")
    _one_of("checkpoint", "server", "answers", what="who answers")
    if asked == "questions" and args.reference:
        raise UserError(
            "--reference goes with --instructions: --questions are rated by themselves."
        )
    judge = named_server("judge")
    table, results = (_compared if asked == "instructions" else _graded)(judge, out)
    print(table)
    described = {
        "judge": {"url": judge.url, "model": judge.model, "options": dict(judge.options)},
        "drawn": None if args.answers else _draws(),
        **results,
    }
    _write(out / "results.md", table)
    _write(out / RESULTS, json.dumps(described, indent=2))


def _compared(judge: Endpoint, out: Path) -> tuple[str, dict[str, Any]]:
    args = flags.FLAGS
    records = read_instructions(args.instructions)
    instructions = [instruction_of(record) for record in records]
    if not args.reference and any("output" not in record for record in records):
        raise UserError(
            "--reference=FILE is missing: answers to compare with, in AlpacaEval's format."
        )
    reference = read_outputs(args.reference or args.instructions)
    see_answered(instructions, reference.texts, f"the reference {reference.name}")
    if args.answers:
        ours = read_outputs(args.answers)
        see_answered(instructions, ours.texts, f"--answers={args.answers}")
        ours = dataclasses.replace(ours, name=args.name or ours.name)
    else:
        name, answer = _who(out)
        said = converse([[instruction] for instruction in instructions], answer)
        answers = [messages[-1]["content"] for messages in said]
        ours = Outputs(name, dict(zip(instructions, answers, strict=True)))
    return compare(records, ours, reference, judge, out)


def _graded(judge: Endpoint, out: Path) -> tuple[str, dict[str, Any]]:
    args = flags.FLAGS
    questions = read_questions(args.questions)
    if args.answers:
        name, conversations = read_conversations(args.answers, questions)
        return grade(questions, args.name or name, conversations, judge, out)
    name, answer = _who(out)
    conversations = converse([question.turns for question in questions], answer)
    return grade(questions, name, conversations, judge, out)


def _who(out: Path) -> tuple[str, Answer]:
    """Name and answers of the checkpoint or the server that was named."""
    args = flags.FLAGS
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    cache = out / ANSWERED
    if args.server:
        server = named_server("server")
        drawn = server_options(sampling, args.max_new_tokens, args.seed)
        answer = of_server(server, cache, **{**drawn, **server.options})
        return args.name or server.model, answer
    loaded = load_model(args.checkpoint)
    new_tokens, seed, rows, dtype = args.max_new_tokens, args.seed, args.rows, args.dtype
    answer = of_checkpoint(loaded, sampling, new_tokens, seed, rows, dtype, cache, local_mesh())
    return args.name or str(args.checkpoint), answer


def _draws() -> dict[str, Any]:
    """How answers were drawn."""
    args = flags.FLAGS
    names = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")
    drawn = {name: getattr(args, name) for name in names}
    if args.server:
        return {**drawn, "server": args.server, "options": server_settings("server")}
    return {**drawn, "checkpoint": str(args.checkpoint), "dtype": args.dtype}


def _one_of(*names: str, what: str) -> str:
    """The one flag of several that is given."""
    given = [name for name in names if getattr(flags.FLAGS, name)]
    if not given:
        raise UserError(f"nothing says {what}: give one of --{', --'.join(names)}.")
    if len(given) > 1:
        raise UserError(f"--{' and --'.join(given)} exclude each other: give one of them.")
    return given[0]


if __name__ == "__main__":
    flags.DEFINE_string("instructions", "", "AlpacaEval's instructions; win rate.")
    flags.DEFINE_string("reference", "", "Answers to compare with; else those in --instructions.")
    flags.DEFINE_string("questions", "", "MT-Bench's questions; ratings.")
    flags.DEFINE_string(
        "checkpoint", "", "Who answers: a workdir, a checkpoint or a Hugging Face folder."
    )
    define_server("server", "Who answers: an OpenAI-compatible server, up to its /v1.")
    flags.DEFINE_string("answers", "", "A file of answers that exist already.")
    define_server("judge", "OpenAI-compatible server of the judge, up to its /v1.")
    flags.DEFINE_string("out", None, "Folder for answers and results.", required=True)
    flags.DEFINE_string("name", "", "What the answers are called; else the checkpoint or model.")
    flags.DEFINE_float("temperature", 0.7, "Of the answers; 0 takes the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
    flags.DEFINE_float("top_p", 1.0, "Keep the fewest tokens that hold this share; 1 keeps all.")
    flags.DEFINE_integer("max_new_tokens", 512, "Most tokens of an answer.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
    flags.DEFINE_integer("rows", 16, "Conversations that a checkpoint answers together.", 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of a checkpoint's weights.")
    flags.DEFINE_integer("workers", 8, "Questions that a server is asked at a time.", 1)
    cli.run(main)
