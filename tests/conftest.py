"""Registers the fixtures, which fixtures.py has, and puts slow tests first."""

import gc
import importlib

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    """Loads them in the processes that run tests: where pytest-xdist starts several, loading torch takes 12 s more."""
    runs_tests = hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses")
    if runs_tests:
        fixtures = importlib.import_module("fixtures")
        session.config.pluginmanager.register(fixtures, "fixtures of all tests")

    # A training run collects garbage several times; looking at every object of the libraries takes half a second each.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """So that no process has a long test left when the others have none."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
