r"""Writes the API-calling task: dialogues to train on and to test with, made from a seed.

    python -m mobilellm_jax.api_dialogues --out=data/api --seed=0
    python -m mobilellm_jax.prepare --chat=api=data/api/train.jsonl --chat_template=plain ...

DIR/train.jsonl and DIR/test.jsonl have one dialogue a line (`evaluation/api_dialogues.py` says what
is in it), which `prepare` reads as conversations. The same seed makes the same dialogues, and more
of them begin with the same ones.
"""

import json

from absl import flags
from etils import epath

from mobilellm_jax import cli
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.api_calls import turns
from mobilellm_jax.evaluation.api_dialogues import TEST, TRAIN, dialogue
from mobilellm_jax.files import new_folder


def write_dialogues(
    out: epath.PathLike, seed: int = 0, train: int = 5000, test: int = 2500
) -> None:
    """Writes train.jsonl and test.jsonl, and says what is in them.

    Raises:
      UserError: `out` is not empty, or a number of dialogues is negative.
    """
    if train < 0 or test < 0:
        raise UserError("--train and --test are numbers of dialogues: 0 or more.")
    with new_folder(out) as folder:
        for split, count in ((TRAIN, train), (TEST, test)):
            said = graded = 0
            with (folder / f"{split}.jsonl").open("w") as file:
                for index in range(count):
                    made = dialogue(seed, split, index)
                    said += len(made["messages"]) - 1
                    graded += len(turns(made["messages"], index))
                    file.write(json.dumps(made, ensure_ascii=False) + "\n")
            print(
                f"{epath.Path(out) / split}.jsonl: {count:,} dialogues of {said / max(count, 1):.2f} "
                f"turns, {graded:,} of them the assistant's"
            )


def _flags() -> None:
    flags.DEFINE_string("out", None, "Folder to make.", required=True)
    flags.DEFINE_integer("seed", 0, "Another seed makes other dialogues.")
    flags.DEFINE_integer("train", 5000, "Dialogues to train on.")
    flags.DEFINE_integer("test", 2500, "Dialogues to test with.")


if __name__ == "__main__":
    _flags()
    given = flags.FLAGS
    cli.run(lambda: write_dialogues(given.out, given.seed, given.train, given.test))
