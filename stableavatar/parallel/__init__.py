"""Several processes, one result: the mesh, sequence, window and guidance parallelism, sharding."""
