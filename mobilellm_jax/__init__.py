"""Pretrain sub-billion-parameter language models in JAX, from raw text to a model a phone runs."""

__version__ = "0.1.0"
