"""Evaluates a trained encoder: cached features, probes, scores, reconstructions, plots."""
