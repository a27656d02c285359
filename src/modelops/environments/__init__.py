"""Takes a bundle's folder from the bundles room, resolves its dependencies, and hands on a whole environment."""

from modelops.environments.cache import Environment, Environments
from modelops.environments.inputs import DependencyInputs, dependency_inputs
from modelops.environments.interpreters import Interpreter, Interpreters
from modelops.environments.lock import EnvironmentKey, Lock, parse_lock
from modelops.environments.manifest import Damage

__all__ = [
    "Damage",
    "DependencyInputs",
    "Environment",
    "EnvironmentKey",
    "Environments",
    "Interpreter",
    "Interpreters",
    "Lock",
    "dependency_inputs",
    "parse_lock",
]
