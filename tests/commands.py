"""Commands of `hpc-supcon` in the process of a test."""

from __future__ import annotations

import pytest

from hpc_supcon import cli


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def succeed(*arguments):
    """A command that must end with 0; what it prints is left to the test."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*map(str, arguments)])
    assert not stopped.value.code
