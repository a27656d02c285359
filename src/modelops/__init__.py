"""ModelOps runs stochastic simulations: parameter sets x replicates, isolated, durable, aggregated.

``import modelops as mo`` shows the public API; everything is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelops.client import Client, Job, JobStatus, submit
    from modelops.client.run import local_cluster, run
    from modelops.errors import ModelOpsError
    from modelops.study import Retry, Study, grid, ints, latin_hypercube, log_range, sobol, until

_WHERE = {
    "Client": "modelops.client",
    "Job": "modelops.client",
    "JobStatus": "modelops.client",
    "ModelOpsError": "modelops.errors",
    "Retry": "modelops.study",
    "Study": "modelops.study",
    "grid": "modelops.study",
    "ints": "modelops.study",
    "latin_hypercube": "modelops.study",
    "local_cluster": "modelops.client.run",
    "log_range": "modelops.study",
    "run": "modelops.client.run",
    "sobol": "modelops.study",
    "submit": "modelops.client",
    "until": "modelops.study",
}
__all__ = [
    "Client",
    "Job",
    "JobStatus",
    "ModelOpsError",
    "Retry",
    "Study",
    "grid",
    "ints",
    "latin_hypercube",
    "local_cluster",
    "log_range",
    "run",
    "sobol",
    "submit",
    "until",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("modelops")
    try:
        module = _WHERE[name]
    except KeyError:
        raise AttributeError(f"module 'modelops' has no attribute {name!r}") from None
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
