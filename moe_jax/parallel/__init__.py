"""Where things lie: the mesh, the sharding of every array, and what the compiled step does."""
