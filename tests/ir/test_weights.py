"""Sources give back what was put in; masks are bits; damaged files are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from zeroskip.ir.errors import ArtifactError
from zeroskip.ir.weights import (
    InMemory,
    Masked,
    OnDisk,
    Source,
    Weights,
    all_finite,
    count_nonzero,
    is_zero_outside,
    pack_bits,
    unpack_bits,
    zero_outside,
)

shapes = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)


def random_mask(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 2**31), st.booleans())
def test_bits_round_trip(shape: tuple[int, ...], seed: int, turned: bool) -> None:
    mask = random_mask(shape, seed)
    if turned:
        mask = mask.transpose(0, -1)
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpack_bits(bits, mask.shape), mask)
    assert unpack_bits(bits, mask.shape).dtype == torch.bool


def test_the_first_entry_is_the_lowest_bit_and_the_rest_is_zero() -> None:
    mask = torch.tensor([[True, False, False, True, False], [True, True, False, False, True]])
    assert pack_bits(mask).tolist() == [0b01101001, 0b10]
    assert pack_bits(torch.ones(3, dtype=torch.bool)).tolist() == [7]


def test_masks_are_views_of_nothing() -> None:
    mask = random_mask((4, 16))
    bits = pack_bits(mask)
    unpack_bits(bits, (4, 16)).logical_not_()
    assert torch.equal(unpack_bits(bits, (4, 16)), mask)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
)
def test_zero_outside_is_masked_fill_to_the_bit(dtype: torch.dtype, turned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    weight[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    weight = weight.to(dtype)
    weight, keep = (weight.T if turned else weight), random_mask((16, 24) if turned else (24, 16))
    found = zero_outside(weight, keep)
    assert found.dtype == dtype
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(found.view(whole), weight.view(whole).masked_fill(~keep, 0))
    assert zero_outside(torch.zeros(0, 4, dtype=dtype), torch.ones(0, 4).bool()).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    values = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0), (3, 17), (6, 32)):
            spoilt = values.clone()
            spoilt[place] = bad
            assert not all_finite(spoilt)
            assert not all_finite(spoilt.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_zero_is_found_and_counted(dtype: torch.dtype) -> None:
    values = torch.zeros(7, 33, dtype=dtype)
    values[1, 1] = -0.0
    nothing = torch.zeros(7, 33, dtype=torch.bool)
    assert is_zero_outside(values, nothing)
    assert is_zero_outside(values[:0], nothing[:0])
    assert count_nonzero(values) == 0
    places = {(0, 0): 1.0, (3, 17): -1.0, (6, 32): float("nan"), (2, 5): 2.0**-14}
    for count, (place, value) in enumerate(places.items(), 1):
        spoilt = torch.zeros_like(values)
        spoilt[place] = values[place] = value
        assert not is_zero_outside(spoilt, nothing)
        assert not is_zero_outside(spoilt.T, nothing.T)
        assert is_zero_outside(spoilt, spoilt != 0)
        assert count_nonzero(values.T) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mask_writes_plain_zeros(dtype: torch.dtype) -> None:
    weight = torch.tensor([float("nan"), -1.0, float("inf"), -0.0, 2.0, float("nan")], dtype=dtype)
    keep = torch.tensor([False, False, False, True, True, True])
    before = weight.clone()
    loaded = Masked(InMemory(weight), pack_bits(keep)).load()
    # 0 * inf is NaN and -1 * 0 is -0: neither may appear.
    assert not torch.signbit(loaded[:3]).any()
    assert (loaded[:3] == 0).all()
    assert torch.signbit(loaded[3])
    assert loaded[4] == 2
    assert loaded[5].isnan()
    assert loaded.dtype == dtype
    assert torch.equal(weight.nan_to_num(9), before.nan_to_num(9))


def test_a_mask_keeps_shape_and_dtype_of_its_source() -> None:
    masked = Masked(InMemory(torch.ones(3, 5, dtype=torch.float16)), pack_bits(random_mask((3, 5))))
    assert (masked.shape, masked.dtype) == ((3, 5), torch.float16)
    assert isinstance(masked, Source)


def test_memory_hands_out_the_tensor_itself_without_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    loaded = InMemory(parameter).load()
    assert loaded.data_ptr() == parameter.data_ptr()
    assert not loaded.requires_grad


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    return path


def on_disk(path: Path, key: str = "a") -> OnDisk:
    return OnDisk(path, key, torch.Size((2, 3)), torch.float32)


def test_disk(shard: Path) -> None:
    assert torch.equal(on_disk(shard).load(), torch.arange(6.0).view(2, 3))
    masked = Masked(on_disk(shard), pack_bits(torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()))
    assert masked.load().tolist() == [[0, 0, 2], [0, 0, 5]]


@pytest.mark.parametrize("size", [0, 4, 30, -1])
def test_a_truncated_file_is_refused(shard: Path, size: int) -> None:
    os.truncate(shard, size if size >= 0 else shard.stat().st_size - 1)
    with pytest.raises(ArtifactError, match="cannot read tensor 'a'") as raised:
        on_disk(shard).load()
    assert str(shard) in str(raised.value)


def test_a_missing_file_or_key_is_refused(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read tensor"):
        on_disk(tmp_path / "none.safetensors").load()
    with pytest.raises(ArtifactError, match="cannot read tensor 'c'"):
        on_disk(shard, "c").load()


def test_weights_load_only_what_is_read(shard: Path) -> None:
    weights = Weights({"good": torch.ones(2), "bad": on_disk(shard, "none")})
    assert list(weights) == ["good", "bad"]
    assert len(weights) == 2
    assert "bad" in weights, "asking for a name must not read the file"
    assert weights.nbytes() == 8 + 24
    with pytest.raises(ArtifactError):
        weights["bad"]
    with pytest.raises(KeyError):
        weights["unknown"]


def test_replacing_shares_every_other_source(shard: Path) -> None:
    weights = Weights({"a": on_disk(shard), "b": torch.ones(2), "c": torch.zeros(2)})
    replaced = weights.replace({"b": torch.full((2,), 7.0)})
    assert replaced.changed_since(weights) == ["b"]
    assert weights.changed_since(weights) == []
    assert replaced.source("a") is weights.source("a")
    assert (weights["b"].tolist(), replaced["b"].tolist()) == ([1, 1], [7, 7])
    assert list(weights.subset(["c", "a"])) == ["c", "a"]
    assert weights.subset(["c"]).source("c") is weights.source("c")


def test_loading_brings_the_named_into_memory(shard: Path) -> None:
    weights = Weights({"a": on_disk(shard), "b": torch.ones(2)})
    loaded = weights.load(["a", "b"])
    assert isinstance(loaded.source("a"), InMemory)
    assert loaded.source("b") is weights.source("b")
    assert isinstance(weights.source("a"), OnDisk)
    assert weights.load([]) is weights
