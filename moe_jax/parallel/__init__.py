"""The mesh, the sharding of every array, a run's processes, and the properties of chips."""
