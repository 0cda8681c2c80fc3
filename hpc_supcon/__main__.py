"""`python -m hpc_supcon` and `torchrun -m hpc_supcon`: the same as `hpc-supcon`."""

from .cli import main

if __name__ == "__main__":
    main()
