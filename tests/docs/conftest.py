from __future__ import annotations

import pytest

from tests.docs import reader, shell


@pytest.fixture(scope="session")
def server():
    with shell.serving() as server:
        yield server


@pytest.fixture(scope="session")
def own(server, tmp_path_factory):
    """A reader's own things."""
    return reader.things(tmp_path_factory.mktemp("reader") / "own", server)
