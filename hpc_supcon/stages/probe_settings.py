"""The settings of the stage `probe`, which may name other data than the run's own."""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from ..errors import ConfigError
from ..run_folder import read_config


def settings_of_probe(run_dir: Path, overrides: list[str]) -> tuple[Config, Config | None]:
    """(the settings, and the same with the run's own data where they name others, else None).

    Raises what the settings alone tell, before minutes of decoding.
    """
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
            "data.source=image_folder data.root=PATH, or probe.transfer=[cifar10:PATH]"
        )
    return settings, settings.model_copy(update={"data": own.data}) if is_other else None
