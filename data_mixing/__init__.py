"""From corpora to mixture weights, by metrics that can be checked (MobileLLM-R1, section 5)."""

import mobilellm_jax  # noqa: F401 (before all else: see there what Ctrl-C does)
