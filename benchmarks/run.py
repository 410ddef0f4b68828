"""``python -m fused_rnn.bench`` of this checkout: the same options, the same rows."""

import sys

import results  # noqa: F401, where the package is

from fused_rnn.bench.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
