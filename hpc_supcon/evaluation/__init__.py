"""What the trained encoder is worth: cached features, probes, scores."""
