"""The training step over batch sizes, with the defaults: see `hpc-supcon bench step --help`."""

import sys

from hpc_supcon.cli import main

if __name__ == "__main__":
    main(["bench", "step", *sys.argv[1:]])
