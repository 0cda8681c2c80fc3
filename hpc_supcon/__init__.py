"""hpc_supcon: supervised contrastive learning of images, from one CPU to a Slurm cluster."""

__version__ = "0.1.0"
