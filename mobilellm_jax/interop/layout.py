"""Where each weight of a network stands in the files of other programs.

For every family of files there is one table of rows `(name there, path here, kind)`. `entries` makes
of it a list with an `Entry` for each tensor of a file, and both directions follow from that list:
`Entry.write` turns a slice of ours into the foreign tensor and `Entry.read` turns it back, bit for
bit, because a kind only orders axes anew.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import Leaves, flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import LS_KVS, MLPS, QK_NORMS, ModelConfig, Stack
from mobilellm_jax.model.quantization import parts_of


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a tensor's axes are ordered here and there.

    Axes are letters: `Kind("D N H", "NH D")` is `[D, N, H]` here and `[N * H, D]` there. With
    `interleaved`, components `2i` and `2i + 1` of a head turn together there, as in the RoFormer
    paper, where here `i` and `i + H/2` do.
    """

    ours: str
    theirs: str
    interleaved: bool = False

    def write(self, array: np.ndarray) -> np.ndarray:
        """Our slice as the foreign tensor; the values are not copied where they need not be."""
        if self.interleaved:
            halves = array.reshape(*array.shape[:-1], 2, -1)
            array = halves.swapaxes(-1, -2).reshape(array.shape)
        return array.transpose(self._order).reshape(self.foreign_shape(array.shape))

    def read(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The foreign tensor as our slice of this shape; undoes `write`."""
        array = array.reshape([shape[axis] for axis in self._order])
        array = array.transpose(np.argsort(self._order))
        if self.interleaved:
            pairs = array.reshape(*shape[:-1], -1, 2)
            array = pairs.swapaxes(-1, -2).reshape(shape)
        return array

    def foreign_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape there of what has this shape here."""
        sizes = dict(zip(self.ours.split(), shape, strict=True))
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.theirs.split())

    @functools.cached_property
    def _order(self) -> list[int]:
        ours = self.ours.split()
        return [ours.index(axis) for group in self.theirs.split() for axis in group]


VECTOR = Kind("D", "D")
TABLE = Kind("V D", "V D")
MATRIX = Kind("D F", "F D")  # [in, out] here, [out, in] there
HEADS = Kind("D N H", "NH D")  # query, key and value
HEADS_INTERLEAVED = Kind("D N H", "NH D", interleaved=True)
HEADS_OUT = Kind("N H D", "D NH")
HEADS_BIAS = Kind("N H", "NH")
HEADS_BIAS_INTERLEAVED = Kind("N H", "NH", interleaved=True)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a foreign file: which slice of which leaf it is, in what order of axes."""

    name: str
    path: str | None  # None: `value` throughout, which the network does without
    layer: int | None  # index into the leaf's first axis; None: the leaf as it is
    kind: Kind
    shape: tuple[int, ...]  # of our slice
    value: float | None = None

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the file."""
        return self.kind.foreign_shape(self.shape)

    def dtype(self, leaves: Leaves) -> np.dtype:
        """Of the weights as they are stored."""
        return leaves["embedding" if self.path is None else self.path].dtype

    def take(self, leaves: Leaves) -> np.ndarray:
        """The foreign tensor, made of the leaves that are exported."""
        if self.path is None:
            return np.full(self.foreign_shape, self.value, np.float32)
        leaf = leaves[self.path]
        return self.write(leaf[:] if self.layer is None else leaf[self.layer])

    def write(self, array: np.ndarray) -> np.ndarray:
        """Our slice as the foreign tensor."""
        return self.kind.write(array)

    def read(self, array: np.ndarray) -> np.ndarray:
        """The foreign tensor as our slice."""
        return self.kind.read(array, self.shape)


Row = tuple[str, str, Kind]  # name there, path here, kind


@dataclasses.dataclass(frozen=True)
class Constant:
    """What a family has and a network may do without: a tensor that then is one number throughout."""

    value: float
    axes: str  # of a block's sizes: D N K H F
    needed: Callable[[ModelConfig], bool] = lambda _: True

    def shape(self, model: ModelConfig, stack: Stack) -> tuple[int, ...]:
        """That of our slice, if there were one."""
        sizes = {"D": model.width, "H": model.head_dim, "F": stack.mlp_width}
        sizes |= {"N": stack.heads, "K": stack.kv_heads}
        return tuple(sizes[axis] for axis in self.axes)


@dataclasses.dataclass(frozen=True)
class Family:
    """The names and kinds of a family's tensors, and what its networks can be.

    `blocks` is how a block is numbered: `{d}` counts applications, so that a block applied twice is
    written twice; `{i}` and `{l}` are its stack and its layer there, so that it is written once. A tuple
    holds the values of a property that the family can express.
    """

    name: str
    top: tuple[Row, ...]
    block: tuple[Row, ...]
    blocks: str = "model.layers.{d}."
    uniform: bool = True  # all blocks have the same widths
    rope: tuple[bool, ...] = (True,)
    mlps: tuple[str, ...] = ("swiglu",)
    qk_norms: tuple[str, ...] = ("none",)
    qkv_bias: tuple[bool, ...] = (False,)
    out_bias: tuple[bool, ...] = (False,)
    ls_kvs: tuple[str, ...] = ("fresh",)
    scaled_rope: tuple[bool, ...] = (True, False)
    heads_fill_width: bool = False  # all heads together are as wide as the network
    # Which matrices its files can hold as integers for products of integers (W8A8).
    eight_bit: tuple[str, ...] = ()
    # By the path of a row.
    constants: Mapping[str, Constant] = dataclasses.field(default_factory=dict)


_TOP: tuple[Row, ...] = (
    ("model.embed_tokens.weight", "embedding", TABLE),
    ("model.norm.weight", "final_norm/scale", VECTOR),
    ("lm_head.weight", "head", MATRIX),
)


def _block(heads: Kind = HEADS, mlp: str = "mlp") -> tuple[Row, ...]:
    return (
        ("input_layernorm.weight", "attention_norm/scale", VECTOR),
        ("self_attn.q_proj.weight", "attention/query", heads),
        ("self_attn.k_proj.weight", "attention/key", heads),
        ("self_attn.v_proj.weight", "attention/value", HEADS),
        ("self_attn.o_proj.weight", "attention/out", HEADS_OUT),
        ("self_attn.q_proj.bias", "attention/query_bias", HEADS_BIAS),
        ("self_attn.k_proj.bias", "attention/key_bias", HEADS_BIAS),
        ("self_attn.v_proj.bias", "attention/value_bias", HEADS_BIAS),
        ("self_attn.o_proj.bias", "attention/out_bias", VECTOR),
        ("self_attn.q_norm.weight", "attention/query_norm/scale", VECTOR),
        ("self_attn.k_norm.weight", "attention/key_norm/scale", VECTOR),
        ("post_attention_layernorm.weight", "mlp_norm/scale", VECTOR),
        (f"{mlp}.gate_proj.weight", "mlp/gate", MATRIX),
        (f"{mlp}.up_proj.weight", "mlp/up", MATRIX),
        (f"{mlp}.down_proj.weight", "mlp/down", MATRIX),
        (f"{mlp}.gate_proj.bias", "mlp/gate_bias", VECTOR),
        (f"{mlp}.up_proj.bias", "mlp/up_bias", VECTOR),
        (f"{mlp}.down_proj.bias", "mlp/down_bias", VECTOR),
    )


# QK-norm with weights, also where ours has none.
UNIT_NORMS = {
    "attention/query_norm/scale": Constant(1.0, "H"),
    "attention/key_norm/scale": Constant(1.0, "H"),
}
# All projections of attention, or of the MLP, have biases together.
_NO_BIASES = {
    "attention/query_bias": Constant(0.0, "NH", lambda model: model.out_bias),
    "attention/key_bias": Constant(0.0, "KH", lambda model: model.out_bias),
    "attention/value_bias": Constant(0.0, "KH", lambda model: model.out_bias),
    "attention/out_bias": Constant(0.0, "D", lambda model: model.qkv_bias),
    "mlp/gate_bias": Constant(0.0, "F", lambda model: model.out_bias),
    "mlp/up_bias": Constant(0.0, "F", lambda model: model.out_bias),
}
_LINEAR = ("blocks", "head")  # in PyTorch's terms
_PLAIN = Family("mistral", _TOP, _block(), eight_bit=_LINEAR)
_FAMILIES = (
    _PLAIN,
    dataclasses.replace(
        _PLAIN,
        name="llama",
        qkv_bias=(True, False),
        out_bias=(True, False),
        constants=_NO_BIASES,
    ),
    dataclasses.replace(_PLAIN, name="qwen2", qkv_bias=(True,)),
    dataclasses.replace(_PLAIN, name="qwen3", qk_norms=("unit", "scaled"), constants=UNIT_NORMS),
    Family(
        "llama4_text",
        _TOP,
        _block(HEADS_INTERLEAVED, mlp="feed_forward"),
        rope=(True, False),
        qk_norms=("none", "unit"),
        eight_bit=_LINEAR,
    ),
    # What the code published with MobileLLM reads: shared blocks stand in its files once.
    Family("mobilellm", _TOP, _block(), "model.layers.{l}.", ls_kvs=LS_KVS),
    Family(
        "hf_shared",
        _TOP,
        _block(),
        "model.stacks.{i}.layers.{l}.",
        uniform=False,
        rope=(True, False),
        mlps=MLPS,
        qk_norms=QK_NORMS,
        qkv_bias=(True, False),
        out_bias=(True, False),
        ls_kvs=LS_KVS,
        eight_bit=_LINEAR,
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}


def entries(model: ModelConfig, family: str | Family) -> list[Entry]:
    """All tensors of a network in the files of a family, in the order of its layers.

    Args:
      model: the network.
      family: one of `FAMILIES`, or a table of your own.

    Raises:
      UserError: the family cannot express the network; the sentence says why.
    """
    family = FAMILIES[family] if isinstance(family, str) else family
    check(model, family)
    shapes = _shapes(model)
    top = [
        Entry(name, path, None, kind, shapes[path])
        for name, path, kind in family.top
        if path in shapes
    ]
    blocks: dict[str, list[Entry]] = {}  # by the prefix of their names
    depth = 0
    for i, stack in enumerate(model.stacks):
        for layer in stack.applications:
            prefix = family.blocks.format(d=depth, i=i, l=layer)
            blocks[prefix] = _block_entries(model, family, shapes, prefix, i, layer)
            depth += 1
    return [top[0], *itertools.chain.from_iterable(blocks.values()), *top[1:]]


def by_leaf(found: list[Entry]) -> list[Entry]:
    """The same leaf by leaf: who takes their tensors in this order reads each leaf of a checkpoint once."""
    paths = list(dict.fromkeys(entry.path for entry in found))
    return sorted(found, key=lambda entry: paths.index(entry.path))


@functools.lru_cache
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flat(transformer.shapes(model)).items()}


def _block_entries(
    model: ModelConfig,
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    stack: int,
    layer: int,
) -> list[Entry]:
    found = []
    for name, path, kind in family.block:
        full = f"stack_{stack}/{path}"
        if full in shapes:
            found.append(Entry(prefix + name, full, layer, kind, shapes[full][1:]))
        elif (constant := family.constants.get(path)) and constant.needed(model):
            shape = constant.shape(model, model.stacks[stack])
            found.append(Entry(prefix + name, None, None, kind, shape, constant.value))
    return found


def default_family(model: ModelConfig) -> str:
    """The stock architecture of Hugging Face that a network is exported as unless another is named."""
    if model.qk_norm != "none":
        return "qwen3"
    if model.qkv_bias and not model.out_bias:
        return "qwen2"
    # transformers wants the heads of a llama to divide its width; of a mistral it does not, and computes
    # the same.
    return "mistral" if model.width % model.stacks[0].heads else "llama"


def check(model: ModelConfig, family: Family) -> None:
    """Raises `UserError` where a family cannot express a network; the sentence names the first reason."""
    for reason in obstacles(model, family):
        way_out = ": hf-shared can" if _shared_can(model) and family.name in FAMILIES else ""
        raise UserError(f"{family.name} cannot express this network, because {reason}{way_out}.")


def _shared_can(model: ModelConfig) -> bool:
    return not any(obstacles(model, FAMILIES["hf_shared"]))


def obstacles(model: ModelConfig, family: Family) -> Iterator[str]:
    """Why a family cannot express a network, as clauses; none if it can."""
    if model.block != ModelConfig.__dataclass_fields__["block"].default:
        yield f"its block is {model.block}"
    widths = {(stack.heads, stack.kv_heads, stack.mlp_width) for stack in model.stacks}
    if family.uniform and len(widths) > 1:
        yield "its stacks differ in heads, kv_heads or mlp_width"
    if "{l}" in family.blocks and "{i}" not in family.blocks and len(model.stacks) > 1:
        yield "it has more than one stack"
    ropes = [stack.rope for stack in model.stacks for _ in stack.applications]
    if set(ropes) - set(family.rope):
        yield f"layer {ropes.index(False)} has no positional embedding (NoPE)"
    if model.mlp not in family.mlps:
        yield f"its MLP is {model.mlp}"
    if model.qk_norm not in family.qk_norms:
        yield f"its QK-norm is {model.qk_norm!r}"
    if model.qkv_bias not in family.qkv_bias:
        yield f"its queries, keys and values have {'' if model.qkv_bias else 'no '}biases"
    if model.out_bias not in family.out_bias:
        yield "what its attention and its MLPs give has biases"
    if bool(model.rope_scaling) not in family.scaled_rope:
        yield "its RoPE is scaled"
    heads = model.stacks[0].heads
    if family.heads_fill_width and heads * model.head_dim != model.width:
        yield f"its {heads} heads of {model.head_dim} are not as wide as the network, {model.width}"
    # A head that is the embedding is no matrix of its own.
    held = {part for part in family.eight_bit if part != "head" or not model.tied}
    if beyond := sorted(parts_of(model.quantization) - held):
        yield (
            f"the numbers of its {' and '.join(beyond)} have 8 bits (--quantize="
            f"{'none leaves rounding to the runtime' if not held else 'w8a8:' + '+'.join(sorted(held))})"
        )
    if model.dead_channels:
        yield "channels of its residual stream may be dead (take them out: python -m mobilellm_jax.prune)"
    if model.ls_kv not in family.ls_kvs and any(stack.repeats > 1 for stack in model.stacks):
        yield f"its shared blocks read the keys of their {model.ls_kv}"
