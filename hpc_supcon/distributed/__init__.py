"""Ranks: how they start, communicate, watch each other and stop together."""
