"""Many runs of the training loop, compared: what `mobilellm_jax.sweep` runs and prints."""
