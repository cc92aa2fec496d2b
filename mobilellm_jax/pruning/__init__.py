"""Structural pruning: groups of weights, their scores, cuts, and the smaller network that is left."""
