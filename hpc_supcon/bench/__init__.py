"""Benchmarks that the command line offers; benchmarks/results/ in the repository holds what they found."""
