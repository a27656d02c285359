"""The pages are true: every example runs, every link leads somewhere, every name and command is described.

How a page is run (`docs/**/*.md` and `README.md`), from top to bottom, in one folder in which ``bundles/`` is
the shipped one:

- ``python`` blocks run in one namespace.
- In ``sh`` blocks each line is a command; in ``console`` blocks each line after ``$``; the rest is output.
  Commands are ``modelops ...``, ``python ...``, ``cd ...``, ``cat ...`` and ``make ...`` (of which only the
  target is checked). They must end with code 0, or with that of a comment ``<!-- exit: 3 -->`` before it.
- A block whose first line is ``# file: NAME`` is written to that file instead.
- A ``text`` block right after one of these is its output: each of its lines must occur, in this order;
  ``...`` in a line is any text, spaces count as one, and the output may have more lines.
- ``toml`` and ``json`` must parse. What is not to be run is ``text`` (or ``mermaid``); a fence without a
  language is an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass, field, fields
from inspect import getmembers
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

import modelops as mo
from modelops.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
ALL_TEXT = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("bundles/*/README.md")]
PAGE_TIMEOUT_S = 280
COMMANDS = ("modelops ", "python ", "cd ", "cat ", "make ")
NOT_RUN = ("text", "mermaid")

_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,})(?P<language>[^\n`]*)$")
_EXIT = re.compile(r"<!-- exit: (\d+) -->")
_FILE = re.compile(r"# file: (\S+)\n")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line``: the number of its opening fence. ``between``: the text before it."""

    language: str
    text: str
    line: int
    between: str


def blocks(markdown: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    lines = iter(enumerate(markdown.splitlines(), 1))
    between: list[str] = []
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            between.append(line)
            continue
        inside = []
        for _, content in lines:
            if content.strip() == fence["marks"]:
                break
            inside.append(content.removeprefix(fence["indent"]))
        text = "".join(f"{content}\n" for content in inside)
        yield Block(fence["language"].strip(), text, number, "\n".join(between).strip())
        between = []


@dataclass
class Step:
    """What `run_page.py` is to do for one block."""

    page: str
    line: int
    kind: str
    text: str
    file: str = ""
    exit: int = 0
    commands: list[str] = field(default_factory=list)
    expected: str | None = None


def steps(markdown: str, page: str) -> list[Step]:
    """Return what is to be run on a page. Raises ValueError where a block cannot be understood."""
    found: list[Step] = []
    just_run: Step | None = None
    for block in blocks(markdown):
        where = f"{page}:{block.line}"
        if block.language == "text" and just_run and not block.between:
            just_run.expected, just_run = block.text, None
            continue
        just_run = None
        step = Step(page, block.line, "", block.text)
        if codes := _EXIT.findall(block.between):
            step.exit = int(codes[-1])
        if named := _FILE.match(block.text):
            step.kind, step.file = "file", named[1]
        elif block.language == "python":
            step.kind = "python"
        elif block.language in ("sh", "console"):
            step.kind = "shell"
            _read_shell(block, step, where)
        elif block.language in ("toml", "json"):
            (tomllib.loads if block.language == "toml" else json.loads)(block.text)
            continue
        elif block.language in NOT_RUN:
            continue
        else:
            known = "python, sh, console, toml, json or text"
            raise ValueError(f"{where}: a fence must say {known}, not {block.language!r}")
        found.append(step)
        just_run = step
    return found


def _read_shell(block: Block, step: Step, where: str) -> None:
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        step.commands = [line[2:] for line in lines if line.startswith("$ ")]
        step.expected = "\n".join(line for line in lines if not line.startswith("$ "))
    else:
        step.commands = [line for line in lines if line.strip() and not line.startswith("#")]
    for command in step.commands:
        if not f"{command} ".startswith(COMMANDS):
            raise ValueError(f"{where}: {command!r} cannot be run by the test; mark the block as text")


def run_page(page: Path, folder: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the examples of a page in an empty folder."""
    (folder / "bundles").symlink_to(ROOT / "bundles")
    (folder / ".steps.json").write_text(
        json.dumps([vars(step) for step in steps(page.read_text("utf-8"), str(page))]), "utf-8"
    )
    return subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("run_page.py")),
            str(folder / ".steps.json"),
            str(folder),
            str(ROOT / "Makefile"),
        ],
        capture_output=True,
        text=True,
        timeout=PAGE_TIMEOUT_S,
        env=environ,
    )


@pytest.fixture(scope="session")
def page_environ(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[dict[str, str]]:
    """Return the variables of all pages: one home and its pool, the ``modelops`` of this interpreter, 120 columns."""
    home = tmp_path_factory.mktemp("docs-home")
    (home / "cache").symlink_to(shared_cache)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "MODELOPS_HOME": str(home), "PATH": path, "COLUMNS": "120", "NO_COLOR": "1"}
    yield environ
    subprocess.run(["modelops", "down"], env=environ, check=True, timeout=PAGE_TIMEOUT_S)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if steps(p.read_text("utf-8"), str(p))], ids=_name)
def test_the_examples_of_the_page_do_what_it_says(
    page: Path, tmp_path: Path, page_environ: dict[str, str]
) -> None:
    done = run_page(page, tmp_path, page_environ)
    assert done.returncode == 0, done.stderr


PLANTED = {
    "raises": ("```python\nx = 1\n```\n\n```python\nassert x == 2, 'not 2'\n```\n", "page.md:5: ", "not 2"),
    "other output": ("```python\nprint('a 2')\n```\n\n```text\na 3\n```\n", "page.md:1: ", "a 3"),
    "other order": ("```python\nprint('a\\nb')\n```\n```text\nb\na\n```\n", "page.md:1: ", "  a\n"),
    "other code": ("```sh\npython -c 'raise SystemExit(3)'\n```\n", "page.md:1: ", "the page says 0"),
    "unknown command": ("```sh\nmodelops no-such-command\n```\n", "page.md:1: ", "No such command"),
    "unknown option": ("```console\n$ modelops run --no-such x\n```\n", "page.md:1: ", "--no-such"),
    "no such target": ("```sh\nmake tea\n```\n", "page.md:1: ", "no target 'tea'"),
    "no such file": ("```sh\ncat nothing.txt\n```\n", "page.md:1: ", "nothing.txt"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_broken_example_fails_with_page_and_line(
    planted: str, tmp_path: Path, page_environ: dict[str, str]
) -> None:
    text, where, words = PLANTED[planted]
    page, folder = tmp_path / "page.md", tmp_path / "folder"
    page.write_text(text)
    folder.mkdir()
    done = run_page(page, folder, page_environ)
    assert done.returncode == 1
    assert where in done.stderr
    assert words in done.stderr


def test_examples_of_a_page_share_files_folder_and_namespace(
    tmp_path: Path, page_environ: dict[str, str]
) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "folder"
    page.write_text(
        textwrap.dedent("""\
        ```python
        # file: sub/hello.py
        print("hello", 17, "times")
        ```
        ```console
        $ cd sub
        $ python hello.py
        hello ... times
        ```
        ```python
        from pathlib import Path
        text = Path("hello.py").read_text()
        ```
        <!-- exit: 5 -->
        ```sh
        python -c "raise SystemExit(5)"
        ```
        ```python
        print(text.count("print"))
        ```
        ```text
        1
        ```
        ```toml
        a = 1
        ```
        """)
    )
    folder.mkdir()
    done = run_page(page, folder, page_environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["```\nx\n```\n", "```sh\ncurl example.org\n```\n", "```toml\na = \n```\n"])
def test_a_block_that_cannot_be_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md:1|line 1"):
        steps(text, "page.md")


_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _prose(markdown: str) -> str:
    """Return a page without its fenced blocks and inline code."""
    lines, inside = [], ""
    for line in markdown.splitlines():
        fence = _FENCE.match(line)
        if inside:
            inside = "" if line.strip() == inside else inside
        elif fence:
            inside = fence["marks"]
        else:
            lines.append(line)
    return re.sub(r"`[^`]*`", "``", "\n".join(lines))


def _anchors(markdown: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    found = []
    for target in _LINK.findall(_prose(page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in _anchors(place.read_text("utf-8"))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", ALL_TEXT, ids=_name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A b: c\n[x](page.md#a-b-c) [y](#nowhere) ![z](no.png) `[code](no)`\n```text\n[c](no)\n```\n"
    )
    assert broken_links(page) == ["#nowhere", "no.png"]


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, new = set(), {DOCS / "index.md"}
    while new:
        page = new.pop()
        reached.add(page)
        for target in _LINK.findall(_prose(page.read_text("utf-8"))):
            place = (page.parent / target.partition("#")[0]).resolve()
            if place.suffix == ".md" and place.exists() and place not in reached:
                new.add(place)
    assert [_name(p) for p in PAGES if p not in reached and p != ROOT / "README.md"] == []


def _code_words(page: Path) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", page.read_text("utf-8")))


def test_every_public_name_is_described() -> None:
    page = DOCS / "reference" / "python-api.md"
    headings = re.findall(r"^#+ `(?:mo\.)?(\w+)", page.read_text("utf-8"), re.MULTILINE)
    assert sorted(set(mo.__all__) - set(headings)) == []
    words = " ".join(_code_words(page))
    members = [
        f"{name}(" for name, value in getmembers(mo.Job) if callable(value) and not name.startswith("_")
    ]
    members += [f.name for f in (*fields(mo.Study), *fields(mo.JobStatus))]
    assert [m for m in members if not re.search(rf"\b{re.escape(m)}", words)] == []


def _commands(group: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


def _options(command: Any) -> Iterable[str]:
    return [opt for p in command.params for opt in p.opts if opt.startswith("--") and opt != "--help"]


CLI = dict(_commands(typer.main.get_command(app), ("modelops",)))


@pytest.mark.parametrize("name", CLI)
def test_every_command_and_option_is_described(name: str) -> None:
    page = (DOCS / "reference" / "cli.md").read_text("utf-8")
    assert name in page
    assert [option for option in _options(CLI[name]) if option not in page] == []


@pytest.mark.parametrize("name", CLI)
def test_every_option_has_a_help_text(name: str) -> None:
    assert CLI[name].help
    assert [p.name for p in CLI[name].params if not getattr(p, "help", "")] == []


def test_every_error_is_described() -> None:
    from modelops import errors

    page = (DOCS / "reference" / "errors.md").read_text("utf-8")
    base = errors.ModelOpsError
    names = [n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, base)]
    assert [n for n in names if f"`{n}`" not in page] == []


@pytest.fixture(scope="session")
def draw_states() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_states", DOCS / "draw_states.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_states_are_drawn_from_the_tables(draw_states: ModuleType) -> None:
    page = (DOCS / "reference" / "states.md").read_text("utf-8")
    assert draw_states.redrawn(page) == page, "run 'make docs'"


def test_a_drawing_that_is_not_that_of_the_tables_is_redrawn(draw_states: ModuleType) -> None:
    page = f"# A\n\n{draw_states.BEGIN}\nold\n{draw_states.END}\n\nB\n"
    drawn = draw_states.redrawn(page)
    assert "old" not in drawn
    assert "running --> finalizing: settled, stopped_early" in drawn
    assert "| `running` | `stopped_early` | `finalizing` |" in drawn
    assert drawn.startswith("# A\n")
    assert drawn.endswith("\n\nB\n")


# Words for which the glossary has another one. Names in code, such as `param`, are no prose.
OTHER_WORDS = {
    r"param(eter)?[- ](combination|vector|point|tuple)s?|paramsets?": "parameter set",
    r"repetitions?|realisations?|realizations?|monte[- ]carlo (runs?|draws?)|simulation runs?": "replicate",
    r"sub-?process(es)?|runner subprocess(es)?": "process",
    r"virtual ?envs?|virtual environments?": "environment",
    r"compute nodes?|executors?": "worker",
    r"(re-)?tries of a chunk|batch(es)? of replicates": "attempt, chunk",
    r"sweeps?|experiments?|campaigns?": "study, job",
}


def _says_another_word(text: str) -> list[str]:
    return [m[0] for words in OTHER_WORDS for m in re.finditer(rf"\b({words})\b", text, re.IGNORECASE)]


@pytest.mark.parametrize("page", [p for p in ALL_TEXT if p.name != "glossary.md"], ids=_name)
def test_the_page_uses_the_words_of_the_glossary(page: Path) -> None:
    assert _says_another_word(_prose(page.read_text("utf-8"))) == []


@pytest.mark.parametrize("name", CLI)
def test_the_command_uses_the_words_of_the_glossary(name: str) -> None:
    command = CLI[name]
    said = " ".join([command.help or "", *(getattr(p, "help", None) or "" for p in command.params)])
    assert _says_another_word(said) == []
