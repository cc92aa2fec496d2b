"""What tests of programs that a model wrote need."""

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.sandbox import run_python


@pytest.fixture(scope="module")
def isolating():
    """Skips where the machine cannot isolate a program."""
    try:
        run_python("", allowed=True)
    except UserError as error:
        pytest.skip(f"{error}")
