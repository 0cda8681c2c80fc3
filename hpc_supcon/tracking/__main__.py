"""`python -m hpc_supcon.tracking`: what tracking/processes.py starts."""

import sys

from .follow import main

if __name__ == "__main__":
    main(sys.argv[1:])
