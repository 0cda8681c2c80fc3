"""The command line: what a person types, one file for each group of commands."""

from .app import app, main

__all__ = ["app", "main"]
