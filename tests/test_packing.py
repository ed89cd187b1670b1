"""Slots in four bits."""

import pytest
import torch

from gru_memory.packing import pack_int4, unpack_int4


@pytest.mark.parametrize("shape", ([1, 2, 3, 5], [2, 4], [1], [0, 3]))
def test_numbers_come_back_within_half_a_step(shape):
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    packed = pack_int4(numbers)
    assert packed.dtype == torch.uint8 and len(packed) == (numbers.numel() + 1) // 2
    found = unpack_int4(packed, shape)
    assert found.shape == numbers.shape
    assert (found - numbers).abs().max() <= 1 / 14 + 1e-6 if numbers.numel() else True


def test_what_fits_exactly_comes_back_exactly():
    numbers = torch.arange(-7, 8) / 7
    assert torch.equal(unpack_int4(pack_int4(numbers), [15]), numbers)
    assert torch.equal(pack_int4(unpack_int4(pack_int4(numbers), [15])), pack_int4(numbers))


def test_the_bytes_of_a_file_keep_their_meaning():
    """Codes 1 to 15, the earlier of two numbers in the low half."""
    assert pack_int4(torch.tensor([-1.0, 1.0, 0.0])).tolist() == [0xF1, 0x08]


def test_numbers_out_of_range_become_the_nearest_in_it():
    assert torch.equal(pack_int4(torch.tensor([3.0, -3.0, 1.1])), pack_int4(torch.tensor([1.0, -1.0, 1.0])))


@pytest.mark.parametrize("shape", ([3, 3], [4], [-1, -8], []))
def test_bytes_of_another_number_are_refused(shape):
    with pytest.raises(KeyError):
        unpack_int4(pack_int4(torch.zeros(8)), shape if shape else [7, 7])


def test_bytes_of_another_type_are_refused():
    with pytest.raises(KeyError):
        unpack_int4(torch.zeros(4), [8])


def test_every_byte_is_a_number_in_range():
    """A file may hold any byte: none makes a slot leave [-1, 1]."""
    assert unpack_int4(torch.arange(256).to(torch.uint8), [512]).abs().max() == 1
