"""Grids: one YAML says what to compare; the cluster does the rest; tables come out."""
