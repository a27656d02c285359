"""What targets compare with: ``target_data``, a value in the bundle's manifest, or a file of the bundle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from modelops.bundles.files import path_trouble
from modelops.errors import BundleError
from modelops_runner.values import InvalidOutputError, dumps

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES: Final = 4 * 1024 * 1024  # it travels with every call of a target


def read_target_data(bundle: Path, declared: Any) -> Any:
    """Return what targets are given for what the manifest says.

    Parameters
    ----------
    bundle
        The bundle's folder.
    declared
        Text names a file of the bundle: of a ``.json`` file the value is given, of any other the bytes. Anything else
        is given as it is.

    Raises
    ------
    BundleError
        There is no such file in the bundle, it is too large or no JSON, or the value cannot be handed on.
    """
    if not isinstance(declared, str):
        try:
            dumps(declared)
        except InvalidOutputError as e:
            raise BundleError(f"target_data cannot be handed to a target: {e}") from e
        return declared
    file = bundle / declared
    if "\0" in declared or path_trouble(declared) or not file.is_file() or not file.resolve().is_relative_to(bundle.resolve()):
        raise BundleError(f"target_data = {declared!r} is no file of the bundle")
    if (size := file.stat().st_size) > MAX_BYTES:
        raise BundleError(
            f"target_data = {declared!r} has {size:,} bytes, more than {MAX_BYTES:,}; let the target read it: its "
            "working directory is the root of the bundle"
        )
    data = file.read_bytes()
    if file.suffix != ".json":
        return data
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise BundleError(f"target_data = {declared!r} is not valid JSON: {e}") from e
