"""What all tests share: goldens, and each model of the zoo captured once."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.golden import check_golden, golden_path
from tests.kept_traces import capture_once, keep_translations
from tests.zoo import ZOO
from zeroskip.ir.program import Program


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # Workers that each use every core wait for one another.


def pytest_collection_finish() -> None:
    # Millions of objects were made by imports and stay; looking through them is a tenth of the time.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # Else libraries say at the end of the process that they leak.


@pytest.fixture(scope="session", autouse=True)
def _models_are_traced_once() -> Iterator[None]:
    """`compile_sparse` captures for real when it meets a model first, and in other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zeroskip.compile.capture", capture_once)
        yield


@pytest.fixture
def translated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tests that use this, the same graph is translated to ONNX once."""
    monkeypatch.setattr("zeroskip.runtime.onnx.translate._standard_operators", keep_translations())


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
        return capture_once(ZOO[name].model(), ZOO[name].inputs())

    return program


@pytest.fixture(scope="session", params=list(ZOO))
def arch(request: pytest.FixtureRequest) -> str:
    """Every name of the zoo; tests of one architecture run together, so one worker captures it."""
    return str(request.param)
