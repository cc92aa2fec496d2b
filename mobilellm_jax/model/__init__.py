"""The network: its description, its parameters, its mathematics. The only room that knows Flax."""
