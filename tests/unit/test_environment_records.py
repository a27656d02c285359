"""What the RECORD files of an environment say is compared with what is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.environments.manifest import read_records, record_damage, survey

if TYPE_CHECKING:
    from pathlib import Path

SITE = "lib/python3.12/site-packages"


def environment(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / SITE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def damage(root: Path) -> list[str]:
    found = survey(root, freeze=False)
    return list(map(str, record_damage(root, found.stats, read_records(root, found.stats), hashes=True)))


def test_the_record_of_a_vendored_package_is_that_of_another_place(tmp_path: Path) -> None:
    # setuptools ships setuptools/_vendor/wheel-0.46.3.dist-info, whose RECORD lists a bin/wheel that is not there.
    vendored = "tools/_vendor/wheel-0.46.3.dist-info"
    files = {
        "tools/__init__.py": "",
        f"{vendored}/RECORD": "bin/wheel,sha256=OLjFs9G7MQ-f_mhuW2aLGpngsyphW_v5FIoyN88Hfk0,339\n",
        f"{vendored}/METADATA": "Name: wheel\n",
        "tools-1.0.dist-info/METADATA": "Name: tools\n",
        "tools-1.0.dist-info/RECORD": f"tools/__init__.py,,0\n{vendored}/METADATA,,12\n",
    }
    root = environment(tmp_path, files)
    assert damage(root) == []
    # What the package that vendors it says of it counts as ever.
    (root / SITE / vendored / "METADATA").write_text("Name: wh")
    assert len(damage(root)) == 1
    (root / SITE / "tools/__init__.py").unlink()
    assert any("tools/__init__.py is listed in RECORD and missing" in text for text in damage(root))
