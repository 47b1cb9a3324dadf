"""`python -m retune`."""

import sys

from retune.cli import main

if __name__ == "__main__":
    sys.exit(main())
