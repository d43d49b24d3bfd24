"""``python -m fastreft`` is the console script ``fastreft``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
