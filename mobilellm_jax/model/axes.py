"""Which axes each parameter of a network has, in the letters of this project: one table.

L layers of a stack, D model width, N query heads, K KV heads, H head width, F MLP width, V vocabulary.
"""

import re

# (pattern of the end of a parameter's path, its axes).
AXES: tuple[tuple[str, str], ...] = (
    (r"embedding", "VD"),
    (r"head", "DV"),
    (r"final_norm/scale", "D"),
    (r"(attention_norm|mlp_norm)/scale", "LD"),
    (r"attention/query", "LDNH"),
    (r"attention/(key|value)", "LDKH"),
    (r"attention/query_bias", "LNH"),
    (r"attention/(key|value)_bias", "LKH"),
    (r"(attention/out|mlp/down)_bias", "LD"),
    (r"(attention|mlp)_shortcut", "LDD"),  # of `pruning.slicegpt_full`
    (r"attention/(query|key)_norm/scale", "LH"),
    (r"attention/out", "LNHD"),
    (r"mlp/(gate|up)", "LDF"),
    (r"mlp/down", "LFD"),
)


def axes_of(path: str) -> str | None:
    """The axes of a parameter, a letter each; None if no line names it.

    Args:
      path: of the parameter, `stack_0/mlp/up`; or one that ends so, like that of a moment.
    """
    for pattern, axes in AXES:
        if re.search(rf"(^|/){pattern}$", path):
            return axes
    return None
