"""What is shown of a job where nobody looks at a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from modelops.client.progress import ProgressBar


def test_on_a_pipe_a_line_stays_one_line_however_long() -> None:
    pipe = io.StringIO()
    text = "preparing the environment in " + "/a/long/folder" * 30
    with ProgressBar(Console(file=pipe)) as bar:
        bar.stage(text)
    assert pipe.getvalue() == text + "\n"
