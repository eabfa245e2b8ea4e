"""Every layer of the registries is held to every law. A new layer adds one line to ``VARIANTS``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seqmodels
from seqmodels import backends
from seqmodels.channel import CHANNELS
from seqmodels.configuration import dump_yaml, parse_yaml
from seqmodels.mixers import MIXERS, MixerOutput
from seqmodels.models import LanguageModel, ModelConfig
from seqmodels.models.arguments import build_layer
from seqmodels.testing import LAWS, check_law, laws, poisoned

# Registry name to the keyword arguments of small variants, by label. d_model is 16.
VARIANTS: dict[str, dict[str, dict]] = {
    "attention": {
        "plain": dict(num_heads=2),
        "grouped window": dict(num_heads=4, num_kv_heads=2, window=6, rotary_fraction=0.5, qk_norm=True, bias=True),
        "pinned": dict(num_heads=4, num_kv_heads=2, window=4, pinned_tokens=3),
        "nope": dict(num_heads=2, rotary_fraction=0.0),
        "bidirectional": dict(num_heads=4, num_kv_heads=2, window=4, bidirectional=True),
    },
    "sparse_global_attention": {
        "plain": dict(num_heads=2, window=6, num_globals=5, block=4),
        "grouped": dict(
            num_heads=4, num_kv_heads=2, window=9, num_globals=2, block=5, rotary_fraction=0.5, qk_norm=True
        ),
        "window alone": dict(num_heads=2, window=4, num_globals=0, block=3),
        "pinned": dict(num_heads=2, window=5, num_globals=3, block=4, pinned_tokens=2),
    },
    "kv_shift_attention": {
        "plain": dict(num_heads=2),
        "grouped window": dict(
            num_heads=4, num_kv_heads=2, window=6, pinned_tokens=2, rotary_fraction=0.5, qk_norm=True, bias=True
        ),
        "gated keys": dict(num_heads=2, shift="k", weights="gate"),
        "wide": dict(num_heads=2, shift="qkv", weights="clamp", shift_width=4, rotary_fraction=0.0),
    },
    "linear_attention": {
        "plain": dict(num_heads=2),
        "retention": dict(num_heads=2, key_dim=4, value_dim=6, decay="fixed", normalize=False, gate=True),
        "normalised output": dict(num_heads=2, feature_map="relu", output_norm=True),
        "gated": dict(num_heads=2, decay="data_dependent"),
        "map in front": dict(num_heads=2, feature_map="taylor_full", key_dim=3, decay="fixed"),
    },
    "prefix_linear_attention": {
        "plain": dict(num_heads=2, feature_dim=4),
        "narrow values": dict(num_heads=3, feature_dim=3, value_dim=5, epsilon=1e-6),
    },
    "based": {"plain": dict(num_heads=2, feature_dim=4), "decay": dict(num_heads=2, feature_dim=3, decay="fixed")},
    "hedgehog": {
        "plain": dict(num_heads=2),
        "grouped split": dict(
            num_heads=4, num_kv_heads=2, feature_map="hedgehog_split", feature_dim=3, rotary_fraction=1.0,
            map_bias=True, shared=True,
        ),
        "tied unnormalised": dict(num_heads=2, feature_map="hedgehog_joint_doubled", normalize=False, tied=True),
        "bidirectional": dict(num_heads=4, num_kv_heads=1, bidirectional=True, rotary_fraction=0.5),
    },
    "hedgehog_window": {
        "plain": dict(num_heads=2, window=6),
        "grouped": dict(
            num_heads=4, num_kv_heads=2, window=5, feature_map="hedgehog_joint", feature_dim=3, rotary_fraction=0.0,
            linear_factor="complement", bias=True,
        ),
    },
    "gated_conv": {"plain": dict(), "wide": dict(expand=1, kernel_size=7)},
    "mamba2": {
        "plain": dict(d_state=8, head_dim=8),
        "groups": dict(d_state=4, head_dim=8, num_groups=2, d_conv=3, norm_before_gate=True),
    },
    "mamba3": {
        "siso": dict(d_state=8, head_dim=8),
        "mimo": dict(d_state=8, head_dim=8, mimo_rank=2, num_groups=2, rope_fraction=1.0, out_norm=True),
        "ablated": dict(d_state=8, head_dim=8, rotation="fixed", trapezoid=False),
        "mimo without rotation": dict(d_state=8, head_dim=8, mimo_rank=3, rotation="none"),
        "half softplus": dict(d_state=8, head_dim=8, pairing="half", a_activation="softplus"),
    },
    "s4d": {
        "plain": dict(d_state=8),
        "bilinear channels": dict(
            d_state=8, init="lin", discretization="bilinear", real_part="softplus", n_ssm=4, channels=2,
            dt_activation="softplus",
        ),
        "softmax": dict(d_state=4, init="real", real_part="relu", discretization="softmax", softmax_length=64),
        "bidirectional": dict(d_state=8, init="ptd", bidirectional=True, channels=2, dt_max=1.0),
    },
    "s4_ptd": {
        "plain": dict(d_state=8),
        "random": dict(d_state=8, perturbation="random", train_b=True, real_part="free", n_ssm=2),
    },
    "s4_dplr": {"plain": dict(d_state=4), "bidirectional": dict(d_state=4, n_ssm=2, channels=2, bidirectional=True)},
    "s5": {
        "plain": dict(d_state=8),
        "convolution": dict(d_state=16, num_blocks=2, mode="convolution", activation="half_glu2", init="ptd"),
        "bidirectional": dict(d_state=8, bidirectional=True, activation="full_glu", real_part="clip", rate=2.0),
    },
    "workspace": {
        "plain": dict(num_slots=6, rank=4, active=3, segment=4),
        "all slots": dict(num_slots=3, rank=5, active=3, segment=7),
    },
    "hydra_diag": {"plain": dict()},
    "chunk_moe": {
        "plain": dict(num_experts=4, experts_per_token=2, d_hidden=8, chunk_size=4),
        "by token": dict(num_experts=3, experts_per_token=1, d_hidden=6, chunk_size=1, balance="bias", z_weight=0.0),
    },
    "product_key_memory": {
        "plain": dict(num_heads=2, top_k=3, query_dim=8, num_subkeys=6, value_dim=5, dropout=0.0),
    },
    "swiglu": {"plain": dict(multiple_of=8)},
    "glu": {"plain": dict(), "half": dict(gate="half_glu2")},
    "mlp": {"plain": dict(), "gated": dict(gated=True, bias=True)},
}  # fmt: skip

CASES = [(name, label) for name, variants in VARIANTS.items() for label in variants]
FIRST = [(name, next(iter(variants))) for name, variants in VARIANTS.items()]
# Compiling takes seconds, and the variants of a layer share their ops and code: the first is compiled.
LAW_CASES = [(*case, law) for case in CASES for law in LAWS if law != "registration" or case in FIRST]
# Forms that compute in float32 inside their kernels have the split law judged there too.
FLOAT32_BACKENDS = [name for name in ("torch", "cpu") if backends.missing(name) is None]


def _factory(name: str):
    return (MIXERS if name in MIXERS else CHANNELS)[name]


def _layer(name: str, label: str) -> torch.nn.Module:
    torch.manual_seed(0)
    with poisoned():
        return _factory(name)(16, **VARIANTS[name][label])


def test_every_registered_layer_is_here():
    shipped = {*MIXERS.shipped(), *CHANNELS.shipped()}
    assert set(VARIANTS) == shipped


@pytest.mark.parametrize(("name", "label", "law"), LAW_CASES)
def test_law(name, label, law):
    check_law(law, _factory(name), d_model=16, **VARIANTS[name][label])


@pytest.mark.parametrize(("name", "label"), CASES)
def test_arguments_go_through_yaml_and_the_registry(name, label):
    """A configuration's route to a layer gives the layer that the constructor gives."""
    arguments = parse_yaml(dump_yaml(VARIANTS[name][label]))
    direct, configured = _layer(name, label), build_layer(name, 16, arguments, "blocks[0]")
    assert type(configured) is type(direct)
    configured.load_state_dict(direct.state_dict())
    x = torch.randn(1, 9, 16)
    assert torch.equal(configured(x).y, direct(x).y)


class Backbone(nn.Module):
    """What a language model has between its embedding and its head, with a layer's signature."""

    causality = "causal"

    def __init__(self, d_model: int, pattern: str, layers: dict) -> None:
        super().__init__()
        self.d_model = d_model
        config = ModelConfig(vocab_size=8, d_model=d_model, pattern=pattern, layers=layers)
        self.backbone = LanguageModel(config).backbone

    def forward(self, x, state=None, *, layout=None, return_state=False):
        return MixerOutput(*self.backbone(x, state, layout=layout, return_state=return_state))

    def step(self, x_t, state):
        return self.backbone.step(x_t, state)

    def init_state(self, batch_size, **options):
        return self.backbone.init_state(batch_size, **options)

    def state_bytes(self, context_length, *, batch_size=1, dtype=None):
        return self.init_state(batch_size, max_length=context_length, device="meta", dtype=dtype).nbytes


HYBRID = {
    "pattern": "gated_conv swiglu mamba3 attention window>mlp",
    "layers": {
        "mamba3": {"d_state": 8, "head_dim": 8},
        "attention": {"num_heads": 2},
        "window": {"layer": "attention", "num_heads": 2, "window": 5},
        "swiglu": {"d_hidden": 24},
    },
}


@pytest.mark.parametrize("law", [law for law in LAWS if law != "registration"])
def test_law_for_a_hybrid_model(law):
    """Layers that obey the laws make a model that obeys them."""
    check_law(law, Backbone, d_model=16, **HYBRID)


def test_hybrid_model_compiles():
    laws.registration(Backbone(16, **HYBRID), opcheck=False)


@pytest.mark.parametrize(("name", "label"), CASES)
def test_laws_over_chunk_boundaries(name, label):
    """The ops' own chunk is 64 tokens."""
    layer = _layer(name, label)
    laws.split(layer, length=131, batch_size=1)
    laws.packing(layer, chunk_size=64)


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize(("name", "label"), FIRST)
def test_exactness_on_backend_in_float32(name, label, backend):
    """The kernels themselves, most of which take float32 and not float64."""
    layer = _layer(name, label)
    try:
        with seqmodels.backend(backend):
            laws.split(layer, dtype=torch.float32)
            laws.packing(layer, dtype=torch.float32)
            laws.batch(layer, dtype=torch.float32)
    except seqmodels.BackendUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), FIRST)
def test_inductor(name, label):
    laws.registration(_layer(name, label), backend="inductor", opcheck=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "label"), CASES)
def test_laws_on_gpu(name, label):
    layer = _layer(name, label)
    laws.backend_agreement(layer, device="cuda")
    for law in (laws.split, laws.packing, laws.batch):
        law(layer, device="cuda", dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "label"), FIRST)
def test_compiles_on_gpu(name, label):
    laws.registration(_layer(name, label), device="cuda", backend="inductor")
