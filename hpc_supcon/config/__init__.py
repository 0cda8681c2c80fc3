"""The configuration of a run: one typed schema, YAML recipes, `key.sub=value` overrides, rules between settings."""

from .check import Stage, check_config, check_ranks
from .check_evaluation import check_report
from .check_parts import records
from .code import check_folder
from .load import load_config, merge, parse_override, recipe_names, resolve, validated
from .schema import Config
from .settings import (
    MAY_DIFFER,
    NEUTRAL,
    differences,
    digest,
    flatten,
    flatten_data,
    is_neutral,
    schema_rows,
    shared_settings,
    to_yaml,
)

__all__ = [
    "MAY_DIFFER",
    "NEUTRAL",
    "Config",
    "Stage",
    "check_config",
    "check_folder",
    "check_ranks",
    "check_report",
    "differences",
    "digest",
    "flatten",
    "flatten_data",
    "is_neutral",
    "load_config",
    "merge",
    "parse_override",
    "recipe_names",
    "records",
    "resolve",
    "schema_rows",
    "shared_settings",
    "to_yaml",
    "validated",
]
