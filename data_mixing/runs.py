"""What runs that train together are, and the folder they are kept in (`together.py` trains them).

    runs.json                     what they are; a folder made with other settings is refused
    <member>/measured.npz         of each member that is complete (`Measured`)
    <member>/checkpoints/<step>/  ordinary checkpoints without optimizer, where they are kept
    unfinished/<group>/           what a group goes on from when it was stopped, however that was

Axes in names: N measured rows, M steps at which they are measured.
"""

import dataclasses
import functools
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_mixing import folders
from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.data.opening import check_length, open_mixture
from mobilellm_jax.data.packing import counted
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import replaced
from mobilellm_jax.leaves import flat
from mobilellm_jax.parallel.mesh import AXES, make_mesh
from mobilellm_jax.training.checkpoint import FOLDER, write_model
from mobilellm_jax.training.config import check
from mobilellm_jax.training.length import Length
from mobilellm_jax.training.setup import Programs, programs, tokenizer_of

SETTINGS, MEASURED, UNFINISHED = "runs.json", "measured.npz", "unfinished"
# Keys of a configuration that have no effect here, or none on what comes out.
_FREE: tuple[str, ...] = (
    "seed",
    "plan",
    "mesh",
    "eval",
    "checkpoint",
    "log_every",
    "wandb",
    "profile",
)
_FREE += ("prefetch", "readers", "workers", "max_skipped")


@dataclasses.dataclass(frozen=True)
class Member:
    """One run: what it has of its own."""

    name: str  # of its folder
    plan: Plan
    seed: int  # of its initial weights


@dataclasses.dataclass(frozen=True)
class Measured:
    """Losses of a member along its training, by the name of the rows: sums over the targets of a row."""

    steps_M: np.ndarray  # int64
    nll_MN: Mapping[str, np.ndarray]  # float32, nats
    targets_N: Mapping[str, np.ndarray]  # int64, how many count

    def mean(self, name: str) -> np.ndarray:
        """float64 [M]: nats per target."""
        return self.nll_MN[name].sum(1, dtype=np.float64) / self.targets_N[name].sum()

    def save(self, path: epath.Path) -> None:
        """Writes one .npz file."""
        arrays = {f"nll/{name}": x for name, x in self.nll_MN.items()}
        arrays |= {f"targets/{name}": x for name, x in self.targets_N.items()}
        save_arrays(path, {"steps": self.steps_M, **arrays})

    @classmethod
    def load(cls, path: epath.Path) -> "Measured":
        """Reads what `save` wrote."""
        arrays = load_arrays(path)
        parts: dict[str, dict[str, np.ndarray]] = {"nll": {}, "targets": {}}
        for key, x in arrays.items():
            kind, _, name = key.partition("/")
            if name:
                parts[kind][name] = x
        return cls(arrays["steps"], parts["nll"], parts["targets"])


@dataclasses.dataclass(frozen=True)
class Runs:
    """All runs that are asked for, opened and checked.

    Attributes:
      config: of all; it fills one device.
      groups: the members that train at once.
      mixtures: the rows of each member.
      probes: rows to measure, int32 [N, T + 1], by name.
      workdir: their folder.
      measure_every: steps between measurements.
      keep: checkpoints kept of each member.
      mesh: devices that share the members.
      made: the programs of one member.
      tokenizer: of all.
    """

    config: ConfigDict
    groups: Sequence[Sequence[Member]]
    mixtures: Mapping[str, Mixture]
    probes: Mapping[str, np.ndarray]
    workdir: epath.Path
    measure_every: int
    keep: int
    mesh: Mesh
    made: Programs
    tokenizer: Tokenizer

    @property
    def length(self) -> Length:
        """Of each run."""
        return self.made.length

    @property
    def members(self) -> list[Member]:
        """Of all groups."""
        return [member for part in self.groups for member in part]

    @property
    def kept_steps(self) -> set[int]:
        """Steps of checkpoints: evenly spaced, the last one the end."""
        return {round(i * self.length.steps / self.keep) for i in range(1, self.keep + 1)}

    @functools.cached_property
    def targets(self) -> dict[str, np.ndarray]:
        """int64 [N]: targets of each measured row that count."""
        ids = self.tokenizer.bos_id, self.tokenizer.eos_id
        return {name: counted(x, *ids).sum(1).astype(np.int64) for name, x in self.probes.items()}

    def measures(self, step: int) -> bool:
        """Whether losses are measured after a step."""
        return step % self.measure_every == 0 or step == self.length.steps

    def result(self, member: Member) -> epath.Path:
        """Where a member's measurements are."""
        return self.workdir / member.name / MEASURED

    def complete(self, member: Member) -> bool:
        """Whether a member is done."""
        return self.result(member).exists()

    def keep_weights(self, i: int, member: Member, step: int, params: Any, origin: Any) -> None:
        """Writes the weights of a member, the i-th of `params`, as a checkpoint, unless it is there."""
        out = self.workdir / member.name / FOLDER / str(step)
        if out.exists():
            return
        own = {"seed": member.seed, "plan": ""}  # the plan is below, and in no file
        meta = {"step": step, "rows": self.length.rows(step), **origin}
        meta |= {"config": {**self.config.to_dict(), **own}}
        meta |= {"plan": member.plan.to_dict(), "plan_hash": member.plan.hash}
        out.parent.mkdir(parents=True, exist_ok=True)
        leaves = flat(jax.tree.map(lambda x: x[i], params))
        write_model(leaves, self.made.model, self.tokenizer, meta, out)


def set_up(
    config: ConfigDict,
    members: Sequence[Member],
    probes: Mapping[str, np.ndarray],
    workdir: epath.PathLike,
    measure_every: int,
    group: int,
    keep: int,
    devices: Sequence[jax.Device],
) -> Runs:
    """Opens and checks everything, then claims the folder; see `together.train_together`.

    Raises:
      UserError: bad input, or the folder is of other runs.
    """
    group = group or len(devices)
    one = ConfigDict(config.to_dict())
    one.mesh = ConfigDict(dict.fromkeys(AXES, 1))
    check(one, devices=1)
    if one.pruning.target:
        raise UserError(
            "config.pruning.target is set, but runs that train together do not prune: set it to 0."
        )
    _check(one, members, measure_every, group, keep, len(devices))
    plan = members[0].plan
    tokenizer = tokenizer_of(plan, plan.directory or members[0].name)
    sources = max(len(member.plan.sources) for member in members)
    made = programs(one, devices[:1], tokenizer.bos_id, tokenizer.eos_id, sources)
    if keep > made.length.steps:
        raise UserError(f"{keep} checkpoints cannot be kept of {made.length.steps} steps.")
    first, last = made.length.rows(0), made.length.rows(made.length.steps)
    mixtures = {}
    for member in members:
        mixture = open_mixture(member.plan, config.row_length, made.model.vocab_size)
        check_length(mixture, first, last - first)
        mixtures[member.name] = mixture
    settings = {
        "config": {key: value for key, value in one.to_dict().items() if key not in _FREE},
        "members": {m.name: {"seed": m.seed, "plan": m.plan.hash} for m in members},
        "probes": {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in probes.items()},
        "measure_every": measure_every,
        "group": group,
        "keep": keep,
        "devices": len(devices),
    }
    mesh = make_mesh({**dict.fromkeys(AXES, 1), AXES[0]: len(devices)}, devices)
    groups = [members[i : i + group] for i in range(0, len(members), group)]
    workdir = epath.Path(workdir).resolve()
    runs = Runs(one, groups, mixtures, probes, workdir, measure_every, keep, mesh, made, tokenizer)
    for name, rows in probes.items():
        if rows.shape[1] != config.row_length + 1:
            raise UserError(
                f"the rows of {name!r} have {rows.shape[1] - 1} tokens, config.row_length is "
                f"{config.row_length}: cut them anew."
            )
        if not runs.targets[name].any():
            raise UserError(f"the rows of {name!r} hold no token to predict: give it other texts.")
    _claim(workdir, settings)
    return runs


def _check(
    config: ConfigDict,
    members: Sequence[Member],
    measure_every: int,
    group: int,
    keep: int,
    devices: int,
) -> None:
    if jax.process_count() > 1:
        raise UserError("runs train together in one process: start this program on one machine.")
    if config.teacher.path or config.teacher.stored:
        raise UserError(
            "runs that train together learn from no teacher: leave config.teacher.path and "
            "config.teacher.stored empty."
        )
    if config.init_from:
        raise UserError(
            "config.init_from is set, but runs that train together start at random weights: leave it out."
        )
    if group < 1 or group % devices:
        raise UserError(
            f"group={group} members cannot be spread over {devices} devices: take a multiple of them."
        )
    if measure_every < 1 or keep < 0:
        raise UserError(f"measure_every={measure_every} is below 1, or keep={keep} below 0.")
    names = [member.name for member in members]
    if not names or len(set(names)) < len(names):
        raise UserError(f"each run needs a name of its own, not {', '.join(names) or 'no run'}.")
    if len({member.plan.tokenizer for member in members}) > 1:
        raise UserError("the plans of the runs have several tokenizers: prepare all data with one.")


def _claim(workdir: epath.Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder these runs', and clears away what a killed program half wrote.

    Raises:
      UserError: it is of other runs, or holds something else.
    """
    folders.claim(workdir, settings, SETTINGS)
    for partial in workdir.glob(f"*/{FOLDER}/*.partial-*"):
        partial.rmtree()


def save_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a .npz file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as unfinished, unfinished.open("wb") as file:
        # As np.savez does, whose own arguments could not be names.
        with zipfile.ZipFile(file, "w") as packed:
            for name, array in arrays.items():
                with packed.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)


def load_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads a .npz file."""
    with path.open("rb") as file, np.load(file) as arrays:
        return dict(arrays)
