"""The loaders against torchvision's way, with the defaults: see `hpc-supcon bench loader --help`."""

import sys

from hpc_supcon.cli import main

if __name__ == "__main__":
    main(["bench", "loader", *sys.argv[1:]])
