"""The notebooks of examples/: executed by a kernel of this environment, in a folder of their own.

python -m tests.notebooks [NAME ...]     # executes them as printed, and writes their outputs into examples/
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
NAMES = ("first_run", "own_data", "compare_losses", "prune_and_export", "read_a_grid")
"""In the order in which the documentation has them."""
PARAMETERS = "parameters"
"""Tag of the cell at the top whose values may be replaced, as papermill has it."""
TIMEOUT_S = 600
COMMAND = """#!/bin/sh
exec "{python}" -m hpc_supcon "$@"
"""


def environment(scratch: Path) -> dict[str, str]:
    """Variables with which a kernel, and the commands that its cells start, use this Python and this package."""
    command = scratch / "bin" / "hpc-supcon"
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text(COMMAND.format(python=sys.executable))
    command.chmod(0o755)
    return {
        # of tqdm, where Jupyter has no ipywidgets
        "PYTHONWARNINGS": "ignore:IProgress not found",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PATH": os.pathsep.join([str(command.parent), os.environ["PATH"]]),
        **{name: str(scratch / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")},
    }


def client(notebook: Any, folder: Path, *, timeout: int | None = TIMEOUT_S) -> Any:
    """A client whose kernel works in `folder`. timeout: seconds for a cell; None: no limit."""
    import nbclient

    resources = {"metadata": {"path": str(folder)}}
    options = {"timeout": timeout, "startup_timeout": TIMEOUT_S, "record_timing": False}
    # each would warn that what it exchanges with this process, on this machine, is not encrypted
    options["extra_arguments"] = ["--log-level=ERROR"]
    return nbclient.NotebookClient(notebook, kernel_name="python3", resources=resources, **options)


def with_parameters(notebook: Any, values: Mapping[str, Any]) -> Any:
    """The notebook with a cell after its cell of parameters that sets these. Raises KeyError for another name."""
    import nbformat

    place = next(i for i, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", ()))
    for name in values:
        if f"\n{name} = " not in f"\n{notebook.cells[place].source}":
            raise KeyError(name)
    text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(text))
    return notebook


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def as_shown(text: str) -> str:
    """What a terminal shows in the end of text that moves its cursor, without colors and empty lines."""
    text = re.sub(r"[^\n]*\n(?=[^\n]*\x1b\[1A)", "", text)  # a line to which it goes back, such as a progress bar
    lines = (re.split(r"\r|\x1b\[2K", line.rstrip("\r"))[-1] for line in text.split("\n"))
    plain = (re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in lines)
    return "".join(f"{line}\n" for line in plain if line)


def tidied(outputs: list[Any], folder: Path) -> list[Any]:
    """Outputs with the text of one stream in one piece, as it is shown, and paths from `folder` on."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    for output in found:
        if output.output_type == "stream":
            output.text = as_shown(output.text).replace(f"{folder}{os.sep}", "")
    return found


def main(names: list[str]) -> None:
    """Executes notebooks as printed and writes them back with their outputs."""
    import nbformat

    for name in names or NAMES:
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as scratch, _variables(environment(Path(scratch))):
            work = Path(scratch) / "work"
            work.mkdir()
            client(notebook, work, timeout=None).execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = tidied(cell.outputs, work)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
        sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main(sys.argv[1:])
