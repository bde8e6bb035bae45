"""The mesh, the sharding of every array, the processes of a run, and the chips' properties."""
