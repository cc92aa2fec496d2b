"""Where arrays live: the mesh and the rules that shard over it."""
