"""Ranks: launching them, what they tell each other, and how they stop together."""
