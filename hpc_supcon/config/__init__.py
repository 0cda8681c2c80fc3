"""The configuration of a run: one typed schema, YAML recipes, `key.sub=value` overrides."""

from .load import (
    NEUTRAL,
    Config,
    differences,
    digest,
    flatten,
    flatten_data,
    is_neutral,
    load_config,
    merge,
    parse_override,
    recipe_names,
    resolve,
    schema_rows,
    to_yaml,
    validated,
)

__all__ = [
    "NEUTRAL",
    "Config",
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
