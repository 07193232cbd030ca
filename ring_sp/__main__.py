"""`python -m ring_sp` is `ring-sp`."""

import sys

from ring_sp.cli import main

if __name__ == "__main__":
    sys.exit(main())
