"""Take what the modeler asked for; hand on parameter sets, seeds and the index line.

Nothing in this room touches Dask, SQL, HTTP or the file system.
"""

from typing import TYPE_CHECKING

from modelops.lazily import imported_from

if TYPE_CHECKING:
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

__getattr__ = imported_from(
    __name__,
    {
        "ParameterSets": "modelops.study.parameter_sets",
        "Retry": "modelops.study.study",
        "Study": "modelops.study.study",
        "Until": "modelops.study.stopping",
        "grid": "modelops.study.sampling",
        "ints": "modelops.study.sampling",
        "latin_hypercube": "modelops.study.sampling",
        "log_range": "modelops.study.sampling",
        "parameter_table": "modelops.study.parameter_sets",
        "sobol": "modelops.study.sampling",
        "until": "modelops.study.stopping",
    },
)
