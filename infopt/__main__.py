"""`python -m infopt` is `infopt`."""

import sys

from infopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
