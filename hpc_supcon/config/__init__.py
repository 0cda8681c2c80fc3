"""The configuration of a run: one typed schema, YAML recipes, `key.sub=value` overrides, rules between settings."""

from .check import Stage, check_config, check_ranks
from .load import load_config, merge, parse_override, recipe_names, resolve, validated
from .schema import Config
from .settings import NEUTRAL, differences, digest, flatten, flatten_data, is_neutral, schema_rows, to_yaml

__all__ = [
    "NEUTRAL",
    "Config",
    "Stage",
    "check_config",
    "check_ranks",
    "differences",
    "digest",
    "flatten",
    "flatten_data",
    "is_neutral",
    "load_config",
    "merge",
    "parse_override",
    "recipe_names",
    "resolve",
    "schema_rows",
    "to_yaml",
    "validated",
]
