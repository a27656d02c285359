"""A module that a bundle imports and its environment lacks: which line brings it, and into which file. Pure."""

from __future__ import annotations

# Where people trip most often; all others are looked for under the module's own name.
_PACKAGES = {
    "PIL": "pillow", "bs4": "beautifulsoup4", "cv2": "opencv-python-headless", "dateutil": "python-dateutil",
    "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml",
}  # fmt: skip


def package_of(module: str) -> str:
    """Return the name of the package that most likely brings a module."""
    top = module.partition(".")[0]
    return _PACKAGES.get(top, top.replace("_", "-"))


def line_to_add(module: str, listed_in: str) -> str:
    """Say which line brings a missing module.

    Parameters
    ----------
    listed_in
        Name of the file that lists the bundle's dependencies: ``pyproject.toml``, ``uv.lock``, ``pylock.toml``,
        ``requirements.txt``, or the bundle's own ``.py`` file; empty if there is none.
    """
    package = package_of(module)
    match listed_in:
        case "requirements.txt" | "":
            return f"add the line {package} to requirements.txt"
        case "uv.lock":
            return f'add "{package}" to dependencies under [project] in pyproject.toml, then run: uv lock'
        case "pylock.toml":
            return f'add "{package}" to dependencies where pylock.toml is made from, and make it anew'
        case script if script.endswith(".py"):
            return (
                f"add \"{package}\" to dependencies in the '# /// script' block of {script}: "
                f'# dependencies = [..., "{package}"]'
            )
        case _:
            return (
                f'add "{package}" to dependencies under [project] in pyproject.toml: '
                f'dependencies = [..., "{package}"]'
            )
