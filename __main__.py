"""`python -m vega_edge` is `vega-edge`."""

import sys

from .cli import main

sys.exit(main())
