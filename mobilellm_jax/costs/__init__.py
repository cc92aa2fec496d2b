"""What a compiled step costs: FLOPs, memory, collectives, and the time below which it cannot go."""
