"""Take what the modeler asked for; hand on parameter sets, seeds and the index line.

Nothing in this room touches Dask, SQL, HTTP or the file system.
"""
