"""Pre-training: state, step, loop, checkpoints, run folder."""
