from __future__ import annotations

import pytest

from . import runs


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """(ranks, *settings) -> folder of a run that nothing happened to."""
    made = {}

    def of(ranks, *settings):
        if (ranks, settings) not in made:
            folder = tmp_path_factory.mktemp("uninterrupted") / "r"
            runs.run(ranks, folder, *settings)
            made[ranks, settings] = folder
        return made[ranks, settings]

    return of
