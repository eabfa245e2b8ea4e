"""Mamba-3 as a layer: released names and sizes, options, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seqmodels.mixers import MIXERS, Mamba3
from seqmodels.models import LanguageModel
from seqmodels.models.config import read_model_config
from seqmodels.ops.mamba3 import Projection
from seqmodels.ops.mamba3.projection import heavy_tail

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
# Without a layer's released shapes: names to shapes, written from the specification of the checkpoints.
D, N, H, P, G, R = 32, 12, 8, 8, 2, 3
INNER = H * P


def test_released_names_and_shapes() -> None:
    siso = Mamba3(D, d_state=N, head_dim=P, num_groups=G, out_norm=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in siso.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (2 * INNER + 2 * G * N + 3 * H + N // 4, D),
        "dt_bias": (H,),
        "B_bias": (H, 1, N),
        "C_bias": (H, 1, N),
        "B_norm.weight": (N,),
        "C_norm.weight": (N,),
        "D": (H,),
        "norm.weight": (INNER,),
        "out_proj.weight": (D, INNER),
    }
    mimo = Mamba3(D, d_state=N, head_dim=P, num_groups=G, mimo_rank=R, rope_fraction=1.0)
    shapes = {name: tuple(tensor.shape) for name, tensor in mimo.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (2 * INNER + 2 * R * G * N + 3 * H + N // 2, D),
        "dt_bias": (H,),
        "B_bias": (H, R, N),
        "C_bias": (H, R, N),
        "B_norm.weight": (N,),
        "C_norm.weight": (N,),
        "mimo_x": (H, R, P),
        "mimo_z": (H, R, P),
        "mimo_o": (H, R, P),
        "D": (H,),
        "out_proj.weight": (D, INNER),
    }


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("180m", 186_849_600),
        ("180m-mimo", 187_291_968),
        ("440m", 443_015_680),
        ("440m-mimo", 444_195_328),
        ("880m", 892_782_336),
        ("880m-mimo", 894_551_808),
        ("1.5b", 1_494_723_584),
        ("1.5b-mimo", 1_497_082_880),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    model = LanguageModel(read_model_config(CONFIGS / f"mamba3-{name}.yaml"), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_hybrid_is_five_to_one() -> None:
    config = read_model_config(CONFIGS / "mamba3-1.5b-hybrid.yaml")
    words = [spec.layers[0].name for spec in config.block_specs()]
    assert words.count("mamba3") == 5 * words.count("attention") == 20
    attention = next(spec.layers[0] for spec in config.block_specs() if spec.layers[0].name == "attention")
    assert attention.arguments["rotary_fraction"] == 0


@pytest.mark.parametrize(("d_state", "fraction", "angles"), [(128, 0.5, 32), (128, 1.0, 64), (10, 0.5, 2), (6, 0.5, 1),
                                                             (5, 1.0, 2), (3, 0.5, 0)])  # fmt: skip
def test_number_of_angles(d_state: int, fraction: float, angles: int) -> None:
    """d_state * fraction, truncated and lowered to an even number of lanes, two lanes an angle."""
    layer = Mamba3(32, d_state=d_state, head_dim=8, rope_fraction=fraction)
    assert layer.init_state(1).angle.shape[-1] == angles
    layer(torch.randn(1, 3, 32))


def test_initial_values() -> None:
    layer = Mamba3(256, head_dim=8, mimo_rank=4, d_state=16, dt_min=0.01, dt_max=0.5)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert dt.min() >= 0.0099
    assert dt.max() <= 0.505
    assert dt.log().std() > 0.9  # log-uniform over ln 50 = 3.9: standard deviation 1.13
    assert (layer.mimo_x == 0.25).all()
    assert (layer.mimo_o == 0.25).all()
    for ones in (layer.mimo_z, layer.B_bias, layer.C_bias, layer.D, layer.B_norm.weight):
        assert (ones == 1).all()
    assert Mamba3(32, head_dim=8, d_state=4, dt_min=1e-6, dt_max=1e-6).dt_bias.exp().min() > 0.9e-4  # the floor


def test_a_activations() -> None:
    x = torch.tensor([-1e4, -1.0, 0.0, 2.0, 1e4], dtype=torch.float64)
    expected = torch.tensor([1 / 10001, 0.5, 1.0, 3.0, 10001.0], dtype=torch.float64)
    torch.testing.assert_close(heavy_tail(x), expected)
    assert torch.autograd.gradcheck(heavy_tail, x[:4].clone().requires_grad_())
    projection = Projection(1, 1, 2, 1, 1, 1, "softplus", 1e-4, "data_dependent", True)
    raw = torch.zeros(1, 2, sum(projection.widths), dtype=torch.float64)
    raw[0, 0, 7], raw[0, 1, 7] = 3.0, -1e4  # z, x, B (2), C (2), dt, A
    token = projection.unpack(raw, torch.zeros(1, dtype=torch.float64))
    a = token.log_decay / token.dt
    torch.testing.assert_close(
        a[0, :, 0], torch.tensor([-torch.nn.functional.softplus(raw[0, 0, 7]).item(), -1e-4]).double()
    )


def test_state_size_does_not_grow() -> None:
    layer = Mamba3(32, d_state=16, head_dim=8, mimo_rank=2)
    assert layer.state_bytes(10) == layer.state_bytes(100_000) == 4 * 8 * (4 + 8 * 16 + 2 * 16 + 8)


def test_low_precision_layer_keeps_float32_state() -> None:
    layer = Mamba3(32, d_state=16, head_dim=8, dtype=torch.bfloat16)
    assert layer.in_proj.weight.dtype == torch.bfloat16
    assert layer.dt_bias.dtype == torch.float32
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    y, state, _ = layer(x, return_state=True)
    assert y.dtype == torch.bfloat16
    assert {tensor.dtype for _, tensor in state.tensors()} == {torch.float32}
    assert layer.step(x[:, 0], state).dtype == torch.bfloat16


def test_optimiser_hints() -> None:
    assert {name for name, hint in Mamba3.parameter_hints.items() if hint.weight_decay == 0} == {"dt_bias", "D"}
    assert MIXERS["mamba3"] is Mamba3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rope_fraction=0.75), r"rope_fraction is 0\.75; expected 0\.5 or 1\.0"),
        (dict(num_groups=3), "not divisible by num_groups=3"),
        (dict(mimo_rank=0), "mimo_rank is 0; expected a positive integer"),
        (dict(head_dim=7), "not divisible by head_dim=7"),
        (dict(pairing="interleaved"), "pairing is 'interleaved'"),
        (dict(a_activation="relu"), "a_activation is 'relu'"),
        (dict(rotation="learned"), "rotation is 'learned'"),
        (dict(dt_min=0.2), "dt_min=0.2 and dt_max=0.1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba3(32, **{"head_dim": 8, **options})


def test_bad_states() -> None:
    layer, x = Mamba3(32, head_dim=8, d_state=4), torch.randn(2, 5, 32)
    other = MIXERS["mamba2"](32, head_dim=8, d_state=4)
    with pytest.raises(TypeError, match="Mamba2State; expected Mamba3State"):
        layer(x, other.init_state(2))
    with pytest.raises(ValueError, match="'angle'"):
        layer(x, layer.init_state(3))
    with pytest.raises(ValueError, match=r"float64"):
        layer(x, layer.init_state(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'angle' is \(3, .* expected \(2, "):
        layer.step(x[:, 0], layer.init_state(3))
    with pytest.raises(TypeError, match="Mamba2State; expected Mamba3State"):
        layer.step(x[:, 0], other.init_state(2))  # type: ignore[arg-type]
