"""Files of a model on the Hugging Face Hub, through the cache of huggingface_hub, and what can go wrong there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import HpcSupconError, HubError, MissingExtra, on_one_line

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def check_hub() -> None:
    """Raise MissingExtra without huggingface_hub."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise MissingExtra("hf: needs huggingface_hub; install it with: pip install 'hpc-supcon[hub]'") from error


def download(name: str, revision: str | None, file: str) -> tuple[Path, str | None]:
    """(the path of a model's file in the cache, the commit it is of). revision: a branch, tag or commit; None: main.

    Without a network the file is that of the cache. Raises HubError, MissingExtra.
    """
    check_hub()
    from huggingface_hub import hf_hub_download

    with hub_errors(f"hf:{name}" + (f"@{revision}" if revision else ""), file):
        path = Path(hf_hub_download(name, file, revision=revision))
    snapshot = path.parent
    return path, snapshot.name if snapshot.parent.name == "snapshots" else None


@contextmanager
def hub_errors(where: str, file: str | None = None) -> Iterator[None]:
    """Inside, errors of huggingface_hub become a HubError of one line. where: the model; file: what is read of it.

    Without a network huggingface_hub tries for half a minute; what it tells of each attempt is not shown.
    """
    from huggingface_hub import errors as hub

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except HpcSupconError:
        raise
    except hub.GatedRepoError:
        raise HubError(f"{where}: access is given on request: ask for it on the model's page, then {LOGIN}") from None
    except hub.RepositoryNotFoundError:
        raise HubError(f"{where}: no such model on the Hub, or a private one: check the name, or {LOGIN}") from None
    except hub.RevisionNotFoundError:
        raise HubError(f"{where}: the model has no such branch, tag or commit") from None
    except hub.LocalEntryNotFoundError:
        raise HubError(
            f"{where}: {file} is not in the cache, and the Hub cannot be reached: download it where there is a "
            "network (`hf download`), or give the folder of a copy"
        ) from None
    except hub.EntryNotFoundError:
        raise HubError(f"{where}: has no {file}; only models in safetensors are read from the Hub") from None
    except Exception as error:  # of the network, of any type, or an answer of the Hub that is not expected
        raise HubError(f"{where}: the Hub did not do it: {on_one_line(error)}") from None
    finally:
        logger.setLevel(level)
