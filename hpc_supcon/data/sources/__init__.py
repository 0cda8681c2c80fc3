"""Data sets by name, and the formats they are stored in."""
