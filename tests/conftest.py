"""The markers of the tests that need more than a plain machine."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped, with the reason, where there is none")
    config.addinivalue_line("markers", "full: needs full-size bundles and gigabytes of memory; part of make test-full")
