"""The loss engine against its alternatives, with the defaults: see `hpc-supcon bench loss --help`."""

import sys

from hpc_supcon.cli import main

if __name__ == "__main__":
    main(["bench", "loss", *sys.argv[1:]])
