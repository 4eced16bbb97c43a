"""What is left to `make test-full`, because it takes minutes: the ordinary tests have 30 on two cores."""

from __future__ import annotations

import os

import pytest

FULL = bool(os.environ.get("VEGA_EDGE_FULL_BUNDLES"))
IN_FULL = pytest.mark.skipif(not FULL, reason="VEGA_EDGE_FULL_BUNDLES is not set: run make test-full")
