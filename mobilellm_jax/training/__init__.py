"""What a step does: state, optimizer, objectives; and what surrounds it: checkpoints, metrics."""
