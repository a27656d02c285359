"""Give the driver a Dask client with ModelOps workers behind it."""
