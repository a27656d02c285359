"""Give the driver a Dask client with ModelOps workers behind it: embedded, or a pool of processes that outlives us."""
