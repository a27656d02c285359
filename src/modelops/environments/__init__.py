"""Takes a bundle's folder from the bundles room, locks its dependencies, hands on a whole environment."""

from modelops.environments.cache import Environment, Environments
from modelops.environments.collect import Collected, EnvironmentInfo, Verified
from modelops.environments.inputs import DependencyInputs, dependency_inputs
from modelops.environments.interpreters import Interpreter, Interpreters
from modelops.environments.lock import EnvironmentKey, Lock, NotALockError, parse_lock
from modelops.environments.manifest import Damage

__all__ = [
    "Collected",
    "Damage",
    "DependencyInputs",
    "Environment",
    "EnvironmentInfo",
    "EnvironmentKey",
    "Environments",
    "Interpreter",
    "Interpreters",
    "Lock",
    "NotALockError",
    "Verified",
    "dependency_inputs",
    "parse_lock",
]
