"""stdout and stderr that are closed, full or without a reader: one line where there is room for it, no traceback."""

from __future__ import annotations

import errno
import importlib
import io
import os
import shlex
import subprocess
import sys

import pytest
from rich.console import Console

from hpc_supcon import cli
from hpc_supcon.cli.streams import safe_streams
from tests.processes import Ranks

app = importlib.import_module("hpc_supcon.cli.app")  # the package has a function of this name
COMMANDS = [
    ["--version"],
    ["--help"],
    ["config", "default"],
    ["config", "--schema"],
    ["grid", "expand", "launch/grids/deck-small.yaml"],
]


def shell(command, redirections):
    """(exit code, stderr) of a command whose descriptors the shell has redirected."""
    line = f"exec {sys.executable} -m hpc_supcon {' '.join(command)} {redirections}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_does_not_fit_on_the_disk_is_one_line_and_exit_code_1(command, tmp_path):
    it = Ranks(command, tmp_path / "stderr", main=onto_a_full_disk)
    assert it.end() == [1]
    assert it.stderr == "hpc-supcon: error: stdout: No space left on device; what was printed is lost\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["--version"], ["config", "default"]])
def test_the_same_of_a_process_of_its_own(command, unbuffered, monkeypatch):
    """Python flushes its streams once more when it ends."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    told = "hpc-supcon: error: stdout: No space left on device; what was printed is lost\n"
    assert shell(command, ">/dev/full") == (1, told)
    assert shell(command, ">/dev/full 2>/dev/full") == (1, "")


def onto_a_full_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    cli.main()


def test_output_to_a_descriptor_that_is_closed_is_one_line_and_exit_code_1():
    told = "hpc-supcon: error: stdout: it is closed; what was printed is lost\n"
    assert shell(["--version"], ">&-") == (1, told)


def test_a_reader_that_is_gone_is_one_line_and_exit_code_1():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "hpc_supcon", "config"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "stdout: Broken pipe" in done.stderr


def test_with_stderr_closed_the_exit_code_tells():
    assert shell(["--version"], "2>&-") == (0, "")
    assert shell(["probe", "missing"], "2>&- >&-")[0] == 2


def test_a_descriptor_that_is_closed_is_not_given_to_the_next_file(tmp_path):
    code = f"""
import os
from hpc_supcon import cli
from hpc_supcon.cli.streams import safe_streams
from tests.processes import Ranks
with safe_streams() as out, open({str(tmp_path / "file")!r}, "w") as file:
    os.write(1, b"from a library")
    os.write(2, b"from a library")
    print("lost")
    assert out.error is not None
"""
    line = f"exec {sys.executable} -c {shlex.quote(code)} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], check=False).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_a_run_goes_on_when_nobody_reads_its_messages(monkeypatch):
    """A terminal that is gone raises OSError in every write."""

    class Gone(io.StringIO):
        def write(self, text=""):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        flush = write

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    with safe_streams() as out:
        Console(stderr=True).print("a note")
        print("a result")
        sys.stderr.flush()
    assert out.error.errno == errno.EIO


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EIO, 1)])
def test_an_error_of_the_system_that_names_a_file_is_one_line(monkeypatch, capsys, number, code):
    def broken(*arguments, **settings):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(app, "guarded", lambda _: broken)
    with pytest.raises(SystemExit) as caught:
        app.main(["config"])
    assert caught.value.code == code
    assert capsys.readouterr().err == f"hpc-supcon: error: /some/file: {os.strerror(number)}\n"
