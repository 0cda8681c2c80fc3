"""Probes of a run's encoder on other data than its own: which data those are, and how they are converted.

Other data are read in the size and the channels that the encoder reads, and normalized as the run's own images. What
is written about them has the name KIND@DATA in place of KIND, so that nothing of the run's own data is replaced.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import run_folder
from ..checkpoint import Checkpoint, load_newest, mismatch_is_corrupt
from ..config import Config
from ..data import HUB, OWN_SOURCES, SOURCES, DataFingerprint, Splits
from ..errors import ConfigError, DataError
from ..parts import file_name
from ..training.agreement import saved_fingerprint
from ..training.data import splits_of
from .encoder import check_has_encoder

RESET = (
    "data.options=null", "data.labels=folders", "data.beton=null", "data.loader=auto", "data.train_images=null",
    "data.crop_while_decoding=false", "data.image_root=null", "data.columns.image=null", "data.columns.label=null",
    "data.columns.split=null", "probe.transfer=[]", "probe.ood=[]", "probe.corruptions=[]",
)  # fmt: skip
"""Of a run's settings, those that are of its own data, which another data.source does not take over."""
_NAME = 40


def _is_one_of_many(source: str) -> bool:
    """Whether it depends on data.root which images it has: those of a user's own."""
    return source in OWN_SOURCES or source not in SOURCES


def data_name(config: Config) -> str:
    """By which the results on a data set are filed: its source; of a user's own images the name of their folder or
    file and a digest of its path, for two may have one name."""
    data = config.data
    place = data.beton or data.root
    source = file_name(data.source)
    if not _is_one_of_many(data.source) or place is None:
        return source
    is_path = not place.startswith(HUB)
    path = os.path.abspath(Path(place).expanduser()) if is_path else place  # noqa: PTH100 (links are not followed)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(path).stem if data.beton else Path(path).name)[:_NAME]
    name = name if data.source in SOURCES else f"{source}-{name}"
    return f"{name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def overrides_of_probe(own: Config, overrides: Sequence[str]) -> list[str]:
    """The overrides of `hpc-supcon probe`, with RESET before them where they name another data.source, or the source
    of labeled images for a run of images without labels."""
    named = {override.partition("=")[2].strip() for override in overrides if override.startswith("data.source=")}
    is_named = bool(named) and (own.data.labels == "none" or named != {own.data.source})
    return [*(RESET if is_named else ()), *overrides]


def is_other_data(own: Config, config: Config) -> bool:
    """Whether the settings name other data than the run's own, or labels that its own do not have. Other places of a
    user's own images count: they may hold a copy, see `is_copy`."""
    a, b = own.data, config.data
    if a.source != b.source or a.labels != b.labels:
        return True
    return _is_one_of_many(b.source) and (a.root, a.beton, a.options) != (b.root, b.beton, b.options)


def is_copy(own: Config, config: Config, found: Checkpoint, data: DataFingerprint) -> bool:
    """Whether these data are those that the checkpoint was trained on, in another place or as .beton files."""
    before = saved_fingerprint(found.state)
    if before is None or (own.data.source, own.data.labels) != (config.data.source, config.data.labels):
        return False
    if before.kind == data.kind:
        return not data.differences(before)
    counts = [{name: split.counts for name, split in one.splits.items()} for one in (before, data)]
    return before.classes == data.classes and counts[0] == counts[1]


def as_encoder_reads(folder: Path, own: Config, config: Config) -> Config:
    """The configuration with the image size and channels that the run's encoder reads. Raises ConfigError where the
    settings ask for others, RunFolderError and CheckpointCorrupt."""
    check_has_encoder(folder)
    found, _ = load_newest(folder / run_folder.CHECKPOINTS)
    assert found is not None
    with mismatch_is_corrupt(found.path):
        encoder = found.state["encoder"]
        size, channels = int(encoder["image_size"]), int(encoder["in_channels"])
    for key, value in (("image_size", size), ("channels", channels)):
        asked = getattr(config.data, key)
        if asked not in (None, value, getattr(own.data, key)):
            raise ConfigError(
                f"data.{key}={asked}: the encoder of {folder} reads {value}, as will be other data; drop it"
            )
    return _converted(config, size, channels)


def check_scores(config: Config, name: str) -> None:
    """Raise ConfigError for scores that are of the run's own data alone. name: of the other data."""
    for key in ("corruptions", "ood"):
        if getattr(config.probe, key):
            raise ConfigError(
                f"probe.{key} needs the run's own data, but the settings name others ({name}): use probe.{key}=[]"
            )


def _converted(config: Config, image_size: int, channels: int, **data: Any) -> Config:
    synthetic = config.data.synthetic.model_copy(update={"image_size": image_size, "channels": channels})
    changes = {"image_size": image_size, "channels": channels, "synthetic": synthetic, **data}
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def without_transfer(config: Config) -> Config:
    return config.model_copy(update={"probe": config.probe.model_copy(update={"transfer": ()})})


def transfer_configs(config: Config, image_size: int, channels: int) -> Iterator[tuple[str, Config]]:
    """(its text, the run's configuration with these data in place of its own) of each set of `probe.transfer`.

    image_size and channels: what the run's encoder reads.
    """
    probe = config.probe.model_copy(update={"transfer": (), "ood": (), "corruptions": ()})
    own = config.model_copy(update={"probe": probe})
    loader = config.data.loader if config.data.loader in ("resident", "torch") else "auto"
    for text, source, root in config.probe.transfer_sets:
        changes = {
            "source": source,
            "root": config.data.root if root is None else root,
            "options": None,
            "beton": None,
            "labels": "folders",
            "loader": loader,
            "train_images": None,
            "crop_while_decoding": False,
            "image_root": None,
            "columns": config.data.columns.model_copy(update={"image": None, "label": None, "split": None}),
        }
        yield text, _converted(own, image_size, channels, **changes)


def check_transfer(config: Config, image_size: int, channels: int, check: Callable[[Config, Splits], None]) -> None:
    """Open each set of `probe.transfer` and check it. Raises ConfigError and DataError, which name the set."""
    for text, other in transfer_configs(config, image_size, channels):
        try:
            check(other, splits_of(other))
        except (ConfigError, DataError) as error:
            raise type(error)(
                f"probe.transfer={text}: {error} (in probe.transfer, the folder follows a colon)"
            ) from None
