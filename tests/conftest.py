"""What all tests share: goldens, and each model of the zoo captured once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest
import torch

from tests.golden import check_golden, golden_path
from tests.zoo import ZOO
from zeroskip.ir.capture import capture
from zeroskip.ir.program import Program


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # Workers that each use every core wait for one another.


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compares a text with the file in tests/goldens that is named after the test."""
    update = bool(request.config.getoption("--update-goldens"))
    path = golden_path(request.node.nodeid)
    return lambda text: check_golden(path, text, update)


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Program]:
    """Returns the Program of an entry of the zoo; each is captured once. Not to be changed."""

    @functools.cache
    def program(name: str) -> Program:
        return capture(ZOO[name].model(), ZOO[name].inputs())

    return program


@pytest.fixture(scope="session", params=list(ZOO))
def arch(request: pytest.FixtureRequest) -> str:
    """Every name of the zoo; tests of one architecture run together, so one worker captures it."""
    return str(request.param)
