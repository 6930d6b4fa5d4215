"""``python -m resnet_fused``: the command line of `tools.cli`."""

from __future__ import annotations

import sys

from resnet_fused.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
