"""The settings of `hpc-supcon probe`, which may name other data than the run's own."""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from ..errors import ConfigError
from ..run_folder import read_config


def settings_of_probe(run_dir: Path, overrides: list[str]) -> tuple[Config, bool]:
    """(the settings, whether they name other data than the run's own). Raises what the settings alone tell, before
    minutes of decoding."""
    own = read_config(run_dir)
    from ..evaluation.encoder import check_has_encoder
    from ..evaluation.transfer import as_encoder_reads, is_other_data, overrides_of_probe

    settings = read_config(run_dir, overrides_of_probe(own, overrides), stages=("probe",))
    if settings.probe.needs_encoder:
        check_has_encoder(run_dir)
    is_other = is_other_data(own, settings)
    if is_other and settings.probe.needs_encoder:
        settings = as_encoder_reads(run_dir, own, settings)
    if settings.data.labels == "none" and not settings.probe.transfer:
        raise ConfigError(
            f"{run_dir}: its images have no labels (data.labels=none) to probe: name labeled data, such as "
            "data.source=cifar10 data.root=PATH, or probe.transfer=[cifar10:PATH]"
        )
    return settings, is_other
