"""A MobileLLM of another depth, `SIZE,LAYERS`, to see that compilation does not depend on it."""

import dataclasses

from ml_collections import ConfigDict

from mobilellm_jax.model.presets import preset
from mobilellm_jax.training.config import base_config


def get_config(argument: str = "1b,12") -> ConfigDict:
    """The network of a size with this many layers; the rest as `configs/mobilellm.py` has it."""
    size, _, layers = argument.partition(",")
    model = preset(f"mobilellm-{size}")
    (stack,) = model.stacks
    stack = dataclasses.replace(stack, layers=int(layers))
    c = base_config(dataclasses.replace(model, stacks=(stack,)))
    c.steps = 480_000
    c.loss_chunks = 8
    return c
