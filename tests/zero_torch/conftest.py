"""Installs the plugin of these tests."""

import pytest
from torch_zero_plugin import POINT

# The first use of DTensor and FSDP2 imports for two seconds; forked ranks inherit it from here.
import camshaft_zero.fully_shard  # noqa: F401
from camshaft import host


@pytest.fixture(autouse=True)
def torch_zero(monkeypatch):
    found = {**host.installed(), POINT.name: POINT}
    monkeypatch.setattr(host, "installed", lambda: found)
