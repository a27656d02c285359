"""Take what the modeler asked for; hand on parameter sets, seeds and the index line.

Nothing in this room touches Dask, SQL, HTTP or the file system.
"""

from modelops.study.parameter_sets import ParameterSets, parameter_table
from modelops.study.sampling import grid, ints, latin_hypercube, log_range, sobol
from modelops.study.stopping import Until, until
from modelops.study.study import Retry, Study

__all__ = [
    "ParameterSets",
    "Retry",
    "Study",
    "Until",
    "grid",
    "ints",
    "latin_hypercube",
    "log_range",
    "parameter_table",
    "sobol",
    "until",
]
