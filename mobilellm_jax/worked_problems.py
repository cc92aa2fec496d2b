r"""Writes conversations in which arithmetic is worked out step by step, made from a seed.

    python -m mobilellm_jax.worked_problems --out=data/worked --seed=0
    python -m mobilellm_jax.prepare --chat=worked=data/worked/train.jsonl --chat_template=plain ...

DIR/train.jsonl and DIR/test.jsonl have one conversation a line, which `prepare` reads: a problem of
the embedded corpus `math` (`data/arithmetic.py`) and its solution, which ends with the answer in a
`\boxed{}`, as MobileLLM-R1 is asked for it. No problem is in both files, nor is one of the test in
the training side of that corpus.
"""

import json

from absl import flags
from etils import epath

from mobilellm_jax import cli
from mobilellm_jax.data import arithmetic
from mobilellm_jax.data.corpora import split_of
from mobilellm_jax.data.embedded import HELDOUT
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder

_ENDLESS = 1 << 60  # characters of problems


def write_problems(out: epath.PathLike, seed: int = 0, train: int = 5000, test: int = 500) -> None:
    """Writes train.jsonl and test.jsonl, and says what is in them.

    Raises:
      UserError: `out` is not empty, or a number of problems is negative.
    """
    if min(train, test) < 0:
        raise UserError("--train and --test are numbers of problems: 0 or more.")
    wanted = {"train": train, "test": test}
    lines: dict[str, list[str]] = {"train": [], "test": []}
    problems = arithmetic.documents(seed, _ENDLESS)
    while any(len(lines[split]) < count for split, count in wanted.items()):
        problem, solution = next(problems)
        split = "train" if split_of(problem, HELDOUT) == "train" else "test"
        if len(lines[split]) < wanted[split]:
            name = f"{split}-{len(lines[split])}"
            record = {"id": name, "messages": conversation(problem, solution)}
            lines[split].append(json.dumps(record, ensure_ascii=False) + "\n")
    with new_folder(out) as folder:
        for split, written in lines.items():
            (folder / f"{split}.jsonl").write_text("".join(written))
            print(
                f"{epath.Path(out) / split}.jsonl: {len(written):,} problems with their solutions"
            )


def conversation(problem: str, solution: str) -> list[dict[str, str]]:
    """A question and its worked answer; the line `Answer: ...` of the solution becomes a box."""
    steps, _, answer = solution.rstrip().rpartition("Answer: ")
    boxed = f"{steps}The final answer is \\boxed{{{answer}}}."
    return [{"role": "user", "content": problem}, {"role": "assistant", "content": boxed}]


def _flags() -> None:
    flags.DEFINE_string("out", None, "Folder to make.", required=True)
    flags.DEFINE_integer("seed", 0, "Another seed makes other problems.")
    flags.DEFINE_integer("train", 5000, "Problems to train on.")
    flags.DEFINE_integer("test", 500, "Problems to test with.")


if __name__ == "__main__":
    _flags()
    given = flags.FLAGS
    cli.run(lambda: write_problems(given.out, given.seed, given.train, given.test))
