"""The grid of GPTQ that training meets."""

from __future__ import annotations

import pytest
import torch

from artifacts.errors import RecipeError
from stages.runtimes.gptq_grid import BITS, Grid, parse_grid, round_to_grid


def _row(*values: float) -> torch.Tensor:
    """One group of 16 columns, zeros behind the values."""
    return torch.tensor([[*values, *[0.0] * (16 - len(values))]])


def test_a_row_is_rounded_as_computed_by_hand() -> None:
    step = torch.tensor(6 / 15).half().item()  # from -3 to 3 in 15 steps
    # -3.75, 1.75, 0.25 and 7.5 steps; the grid ends 7 steps above zero
    found = round_to_grid(_row(-1.5, 0.7, 0.1, 3.0), Grid(4, 16))[0, :5]
    assert torch.equal(found, torch.tensor([-4 * step, 2 * step, 0, 7 * step, 0]).half().float())


def test_a_group_without_negative_weights_loses_its_upper_half_as_in_gptqmodel() -> None:
    step = torch.tensor(3 / 15).half().item()
    found = round_to_grid(_row(3.0, 1.0), Grid(4, 16))[0, :3]
    assert torch.equal(found, torch.tensor([7 * step, 5 * step, 0]).half().float())


def test_a_group_of_zeros_stays_zero() -> None:
    assert torch.equal(round_to_grid(_row(), Grid(2, 16)), _row())


def test_groups_are_rounded_apart_and_the_last_one_may_be_short() -> None:
    weights = torch.randn(3, 72, generator=torch.Generator().manual_seed(0))
    parts = [round_to_grid(part, Grid(4, 32)) for part in torch.split(weights, 32, dim=1)]
    assert [part.shape[1] for part in parts] == [32, 32, 8]
    assert torch.equal(round_to_grid(weights, Grid(4, 32)), torch.cat(parts, 1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 128])
def test_weights_are_what_gptqmodel_packs_and_computes_with(bits: int, group: int) -> None:
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed (pip install gptqmodel==7.6.0)")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.quantizer import Quantizer

    layer = torch.nn.Linear(288, 64, bias=False)
    with torch.no_grad():
        layer.weight[0, :32] = layer.weight[0, :32].abs()
        layer.weight[1, 32:64] = 0
    weights = layer.weight.detach().clone()
    quantizer = Quantizer(QuantizeConfig(bits=bits, group_size=group))
    quantizer.configure(perchannel=True)
    rounded, scales, zeros = [], [], []
    for part in torch.split(weights, group, dim=1):
        quantizer.find_params(part.clone(), weight=True)
        rounded.append(quantizer.quantize(part))
        scales.append(quantizer.scale)
        zeros.append(quantizer.zero)
    layer.weight.data = torch.cat(rounded, 1)
    packed = TorchLinear(
        bits=bits, group_size=group, sym=True, desc_act=False, in_features=288, out_features=64, register_buffers=True
    )
    packed.pack(layer, torch.cat(scales, 1), torch.cat(zeros, 1), torch.arange(288, dtype=torch.int32) // group)
    packed.post_init()
    shipped = packed.dequantize_weight().T.float()
    assert torch.equal(round_to_grid(weights, Grid(bits, group)), shipped)
    assert not torch.equal(shipped, weights)


def test_names_say_bits_and_group() -> None:
    assert parse_grid("gptq-4bit") == Grid(4, 128)
    assert parse_grid("gptq-8bit-64") == Grid(8, 64)
    for bits in BITS:
        assert parse_grid(Grid(bits, 32).name) == Grid(bits, 32)


@pytest.mark.parametrize("name", ["gptq", "gptq-5bit", "gptq-4bit-48", "gptq-4bit-", "gptq-4", "gptq-04bit-"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="cannot be rounded"):
        parse_grid(name)
