"""Grids: many runs from one YAML file, their submission, their state and their report."""
