"""The benchmarks of the command line; benchmarks/results/ in the repository has their results."""
