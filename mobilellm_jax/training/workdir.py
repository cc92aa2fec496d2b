"""One workdir, one run: what may be continued, and what would be overwritten."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import alone, replaced
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.parallel import distributed
from mobilellm_jax.training.config import FREE, base_config, differences


@contextlib.contextmanager
def claimed(workdir: epath.PathLike, config: ConfigDict) -> Iterator[epath.Path]:
    """Around a run: its workdir, which is this run's and, on one machine, no other program trains in.

    config.json is checked where there is one, and written. Of several processes the first does so, and
    the others look whether they see it.

    Raises:
      UserError: the workdir belongs to another run, or has results but no configuration; another program
        is training there.
    """
    if not os.fspath(workdir):
        raise UserError(
            "the workdir has an empty name: give the directory of this run as --workdir."
        )
    workdir = epath.Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: name a directory as --workdir.")
    path = workdir / "config.json"
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except (ValueError, RecursionError):
            old = None
        if not isinstance(old, dict):
            raise UserError(
                f"{path} is not JSON or no configuration: if nothing in that workdir is needed, remove it, "
                "else restore the file."
            )
        _same_config(old, config.to_dict(), str(workdir))
    elif (workdir / "meta").exists():
        raise UserError(
            f"{workdir} is a checkpoint and no workdir: start at it with --config.init_from={workdir} "
            "and choose another --workdir."
        )
    elif any((workdir / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        raise UserError(f"{workdir} holds results but no config.json: choose another --workdir.")
    with alone(workdir, "is training") if distributed.leads() else contextlib.nullcontext():
        if distributed.leads():
            workdir.mkdir(parents=True, exist_ok=True)
            with replaced(path) as unfinished:
                unfinished.write_text(text)
        distributed.meet("claimed")
        if not distributed.all_of("workdir is seen", path.exists()):
            raise UserError(
                f"not every process sees {path}: all need the same workdir, on a shared file system or in "
                "an object store."
            )
        yield workdir


def _same_config(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    found = differences(complete(old), complete(new))
    fixed = {key: pair for key, pair in found.items() if key.split(".")[0] not in FREE}
    if fixed:
        listed = "; ".join(
            f"config.{key}: {a!r} there, {b!r} here" for key, (a, b) in fixed.items()
        )
        raise UserError(f"{where} belongs to another run ({listed}): choose another --workdir.")
    for key, (a, b) in found.items():
        print(f"resume: config.{key} was {a!r}, is {b!r}.")


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the keys that did not exist yet when its run began, at their defaults."""
    if "model" not in config:  # not one of ours: everything differs
        return dict(config)
    model = ModelConfig.from_dict(config["model"])
    return {**_merged(base_config(model).to_dict(), config), "model": model.to_dict()}


def _merged(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, and what it lacks; the arguments of a function belong to that function alone."""
    if defaults.get("use") != config.get("use"):
        return dict(config)
    both = {k: (v, config[k]) for k, v in defaults.items() if k in config}
    parts = {
        k: _merged(a, b)
        for k, (a, b) in both.items()
        if isinstance(a, Mapping) and isinstance(b, Mapping)
    }
    return {**defaults, **config, **parts}


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
      UserError: there is none, it is torn, or it is of something else, such as a Hugging Face folder.
    """
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        config, wrong = {}, "missing or torn"
    else:
        wrong = "not of a run of ours"
    kinds = {"plan": str, "model": dict, "row_length": int, "eval": dict}  # keys that every run has
    whole = isinstance(config, dict) and all(isinstance(config.get(k), v) for k, v in kinds.items())
    if not whole:
        raise UserError(
            f"{path} is {wrong}, so {workdir} is not the workdir of a run: "
            "name the directory that was given to training as --workdir."
        )
    return config


def check_same_run(
    meta: Mapping[str, Any], config: ConfigDict, plan: Plan, where: epath.Path
) -> None:
    """A checkpoint may have been copied here: it must be of this network, configuration and plan.

    Raises:
      UserError: it is not; the sentence lists what differs.
    """
    models = (ModelConfig.from_dict(raw) for raw in (meta["config"]["model"], config.model))
    if found := differences(*(model.to_dict() for model in models)):
        listed = "; ".join(f"model.{key}: {a!r} there, {b!r} here" for key, (a, b) in found.items())
        raise UserError(f"the checkpoint in {where} is of another network ({listed}).")
    _same_config(
        {k: v for k, v in meta["config"].items() if k not in FREE},
        {k: v for k, v in config.to_dict().items() if k not in FREE},
        str(where),
    )
    if changed := check_past(meta, plan, config.row_length, str(where)):
        print(f"resume: {changed}.")


def check_past(meta: Mapping[str, Any], plan: Plan, row_length: int, where: str) -> str:
    """What the run of a checkpoint has read so far must be in the plan as it is now.

    Returns:
      what is different from there on, for people; "" where nothing is.

    Raises:
      UserError: it is not; the sentence lists what differs.
    """
    if meta["plan_hash"] != plan.hash:
        # A plan may change from here on; what the run has read it cannot change.
        tokens = int(meta["rows"]) * row_length
        old = Plan.from_dict(meta["plan"], f"the plan of the checkpoint in {where}").past(tokens)
        if changed := [key for key, value in plan.past(tokens).items() if value != old[key]]:
            raise UserError(
                f"the checkpoint in {where} was trained on another plan ({meta['plan_hash'][:12]}) than "
                f"{plan.directory} holds now ({plan.hash[:12]}); of the first {tokens:,} tokens they "
                f"differ in {', '.join(changed)}. Put that plan back, let the change begin with a new "
                "stage (`python -m mobilellm_jax.plan --change_at`), or use a new --workdir."
            )
        left = [
            f"rows {s.at_row:,} to {s.at_row + s.rows - 1:,} are left out"
            + (f" ({s.reason})" if s.reason else "")
            for s in plan.skips
            if s.at_row >= int(meta["rows"])
        ]
        changed_now = f"the plan has changed from {tokens:,} tokens on, {plan.hash[:12]} now"
        return "; ".join([changed_now, *left])
    return ""
