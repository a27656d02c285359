"""Take requests from a worker on a pipe; run a bundle's code in its own environment; hand back outcomes.

Standard library only, Python 3.9 or later, loaded by path (see `launch`), so that nothing else of the
worker reaches the bundle. The parent imports `frames` and `values` from here: the format is written once.
"""
