"""The dispatch of 2:4 products: what a table answers, keeps and refuses. Times need a device."""

from __future__ import annotations

import json

import pytest
import torch

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.semi_structured import pack_semi_structured
from zeroskip.runtime import candidates24
from zeroskip.runtime.candidates24 import DENSE, KERNELS, Choice
from zeroskip.runtime.gpu_dispatch import (
    Entry,
    Key,
    Table,
    describe,
    explain_refusal,
    shipped_table,
    tune,
)

KEY = Key(4096, 4096, "bfloat16", "NVIDIA H200")
FAST = Choice("mma24", {"warps_n": 4, "split": 0})
LIBRARY = Choice("cusparselt", {"least": 512, "algorithm": 17})
FOUND = {
    1: Entry(FAST, 20.0, 10.0),
    16: Entry(FAST, 24.0, 15.0),
    64: Entry(DENSE, 30.0, 30.0),
    512: Entry(LIBRARY, 80.0, 60.0),
}


@pytest.fixture
def table() -> Table:
    table = Table()
    table.put(KEY, FOUND)
    return table


@pytest.mark.parametrize(
    ("tokens", "choice"),
    [
        (1, FAST),
        (2, FAST),
        (16, FAST),
        (17, DENSE),  # the entry of 64
        (64, DENSE),
        (65, DENSE),  # 512 rows take 60 us, 65 rows dense about 30
        (300, DENSE),  # 56 us
        (511, LIBRARY),
        (512, LIBRARY),
        (5000, LIBRARY),  # beyond what was measured: what was best for the most
    ],
)
def test_find(table: Table, tokens: int, choice: Choice) -> None:
    assert table.find(KEY, tokens) == choice


def test_dense_where_nothing_is_known(table: Table) -> None:
    for other in (
        Key(4096, 4097, "bfloat16", KEY.device),
        Key(4096, 4096, "float16", KEY.device),
        Key(4096, 4096, "bfloat16", "NVIDIA A10"),
    ):
        assert table.find(other, 1) == DENSE


def test_between_measured_numbers_dense_has_the_benefit_of_doubt() -> None:
    table = Table()
    table.put(KEY, {1: Entry(DENSE, 10.0, 10.0), 8: Entry(FAST, 10.2, 9.9)})
    assert table.find(KEY, 8) == FAST, "it was measured to be faster"
    assert table.find(KEY, 5) == DENSE, "it may not be"


def test_json_round_trip(table: Table) -> None:
    stored = json.loads(json.dumps(table.to_json()))
    again = Table.from_json(stored)
    assert again.entries == table.entries
    assert again.to_json() == stored
    assert again.find(KEY, 511).options["least"] == 512


def test_later_measurements_replace_earlier_ones(table: Table) -> None:
    table.put(KEY, {1: Entry(DENSE, 9.0, 9.0)})
    assert table.find(KEY, 1) == DENSE
    assert table.find(KEY, 16) == FAST


def test_another_version_is_refused(table: Table) -> None:
    with pytest.raises(LoweringError, match=r"(?s)version 0.*tune again"):
        Table.from_json({**table.to_json(), "version": 0})


def test_an_unknown_kernel_is_refused(table: Table) -> None:
    stored = table.to_json()
    stored["linears"][0]["measured"][0]["kernel"] = "mma42"
    with pytest.raises(LoweringError, match=r"(?s)mma42.*there are dense, mma24"):
        Table.from_json(stored)


def test_shipped_table_is_sound() -> None:
    table = shipped_table()
    assert table.entries
    for key, found in table.entries.items():
        assert key.device
        for tokens, entry in found.items():
            assert entry.speedup >= 1, (key, tokens)
            kernel = KERNELS[entry.choice.kernel]
            if entry.choice.kernel in ("mma24", "gemv24", "gemm24"):
                known = [set(options) for options in kernel.offers(tokens, key.rows, key.columns)]
                assert set(entry.choice.options) in known, (
                    "its options are those of a configuration"
                )


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (FOUND, "sparse 1.60x to 2.00x at m=1..16, dense at m=64, sparse 1.33x at m=512"),
        ({4: Entry(DENSE, 1.0, 1.0)}, "dense at m=4"),
        ({4: Entry(FAST, 2.0, 1.0)}, "sparse 2.00x at m=4"),
    ],
)
def test_describe(found: dict[int, Entry], text: str) -> None:
    assert describe(found) == text


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "reason"),
    [
        (64, 1020, torch.bfloat16, "K=1020 is not a multiple of 32"),
        (64, 64, torch.float32, "float32"),
    ],
)
def test_refusals_of_mma24(rows: int, columns: int, dtype: torch.dtype, reason: str) -> None:
    refusal = KERNELS["mma24"].refuse(dtype, rows, columns, torch.device("cpu"))
    assert refusal is not None
    assert reason in refusal


def test_float32_is_served_by_nothing() -> None:
    assert "float32" in str(explain_refusal(64, 64, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("name", ["mma24", "gemv24", "gemm24", "decompress24"])
def test_forms_hold_the_weight(name: str) -> None:
    weight = pack_semi_structured(torch.eye(64, 128, dtype=torch.bfloat16))
    form = KERNELS[name].make(weight)
    bits = sum(part.numel() * part.element_size() for part in form) * 8
    # Four shares of metadata are rounded up to 512 columns in the plain form.
    assert bits <= 64 * 128 * 9 * 1.4


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 31, 64, 65, 200, 512, 513, 4096])
def test_every_number_of_tokens_has_candidates_below_the_limits(tokens: int) -> None:
    offered = {name: list(kernel.offers(tokens, 4096, 4096)) for name, kernel in KERNELS.items()}
    assert bool(offered["mma24"]) == (tokens <= candidates24.MMA_MOST)
    assert bool(offered["gemv24"]) == (tokens <= 4)
    assert bool(offered["cusparselt"]) == (tokens >= candidates24.CUSPARSELT_LEAST)
    assert any(offered[name] for name in offered if name != "dense")


def test_tuning_off_a_device_is_refused() -> None:
    with pytest.raises(LoweringError, match=r"(?s)weight on cpu.*CUDA device first"):
        tune(pack_semi_structured(torch.eye(64, dtype=torch.bfloat16)))


def test_work_space_is_made_once_and_spared_for_graphs() -> None:
    x = torch.zeros(1)
    scratch: dict[str, torch.Tensor] = {}
    spare: dict[str, torch.Tensor] = {}
    call = candidates24.Call(x, None, 4, scratch, spare)
    first = call.room("parts", 8, torch.float32)
    assert call.room("parts", 8, torch.float32) is first
    assert call.room("parts", 9, torch.float32) is not first
    assert set(spare) == set(scratch)
    assert spare["parts 8"] is not first
