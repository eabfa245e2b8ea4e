"""The Hydra hybrid: its layout and parameters against specification's table, and the laws of the whole model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seqmodels.configuration import convert, parse_yaml
from seqmodels.layout import Layout
from seqmodels.mixers import SparseGlobalAttention, Workspace
from seqmodels.models import HydraConfig, LanguageModel, ModelConfig, account, generate, load_config, parameter_hints
from seqmodels.models.block import Parallel
from seqmodels.models.config import write_out
from seqmodels.training.config import convert_train_config

FOLDER = Path(__file__).parents[2] / "configs" / "models"
SMALL: dict[str, Any] = {
    "vocab_size": 29,
    "d_model": 16,
    "num_blocks": 6,
    "state_space": {"d_state": 8, "head_dim": 8},
    "attention": {"num_heads": 2, "window": 6, "num_globals": 3, "block": 3},
    "experts": {"num_experts": 3, "d_hidden": 8, "chunk_size": 2},
    "workspace": {"num_slots": 5, "rank": 4, "active": 3, "segment": 4},
    "memory": {"num_heads": 2, "top_k": 3, "query_dim": 8, "num_subkeys": 5, "value_dim": 8, "dropout": 0.0},
}
LENGTH = 23  # a multiple of no chunk, block or segment


def small(seed: int = 0, **changes: Any) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(HydraConfig(**{**SMALL, **changes}).model_config(), dtype=torch.float64)
    with torch.no_grad():  # make every part matter: deep scaling leaves the memories faint
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(29, shape, generator=torch.Generator().manual_seed(1))


def test_parameters_are_the_tables_row_by_row() -> None:
    d, blocks, vocabulary, experts, hidden = 2048, 24, 50304, 8, 1024
    n, value, heads, slots, rank = 512, 1024, 4, 64, 128
    stated = {  # the table, in millions, and what our layers have besides
        "embedding": (103.0, vocabulary * d, 0),
        "hydra_diag": (503.4, blocks * (5 * d * d + d), 0),
        "sparse_global_attention": (134.2, blocks // 3 * 4 * d * d, blocks // 3 * (d + 1)),  # the scorer
        "chunk_moe": (604.2, blocks // 2 * (3 * experts * d * hidden + experts * d), 0),
        "product_key_memory": (
            275.2,
            n * n * value + 2 * heads * n * 128 + 256 * heads * d + 2 * d * value,
            256 + d,  # the query's norm and the gate
        ),
        "workspace": (2.0, 7 * d * rank + slots * (d + rank), 2 * d),  # two gates
    }
    rows = {row.name: row.parameters for row in account(load_config(FOLDER / "hydra-1.6b.yaml"), length=8)}
    for name, (millions, formula, besides) in stated.items():
        print(f"{name}: {rows[name]} parameters; the table's formula gives {formula}, and {besides} more are ours")
        assert abs(formula / 1e6 - millions) < 0.06, name  # the table has one decimal, and cuts one of them off
        assert rows[name] == formula + besides, name
    assert rows["norms"] == (blocks + 1 + 1 + 1) * d  # a block, the shared workspace, the shared memory, the last
    assert rows["gates"] == blocks + blocks // 3 + blocks // 2
    assert rows["head (tied)"] == 0
    assert round(sum(formula for _, formula, _ in stated.values()) / 1e9, 3) == 1.622
    assert rows["total"] == sum(count for name, count in rows.items() if name != "total")
    assert abs(rows["total"] / 1.61e9 - 1) < 0.01  # the paper's total


def test_the_mamba3_variant_differs_in_the_state_space_path_alone() -> None:
    faithful, variant = (
        {row.name: row.parameters for row in account(load_config(FOLDER / f"{name}.yaml"), length=8)}
        for name in ("hydra-1.6b", "hydra-1.6b-mamba3")
    )
    assert set(faithful) - set(variant) == {"hydra_diag"}
    assert set(variant) - set(faithful) == {"mamba3"}
    assert {k: v for k, v in faithful.items() if k in variant and k != "total"} == {
        k: v for k, v in variant.items() if k in faithful and k != "total"
    }
    alone = ModelConfig(
        vocab_size=1, d_model=2048, pattern="24x mamba3",
        layers={"mamba3": {"d_state": 128, "expand": 2, "head_dim": 64, "out_norm": True}},
    )  # fmt: skip
    assert variant["mamba3"] == {row.name: row.parameters for row in account(alone, length=8)}["mamba3"]


def test_sites() -> None:
    config = HydraConfig(**{**SMALL, "num_blocks": 12, "memory_blocks": (0, 11)}).model_config()
    plain, attends, mixes = "state_space", "state_space|sparse_attention workspace", "state_space|experts"
    both = "state_space|sparse_attention|experts workspace"
    period = " ".join([mixes, plain, both, plain, mixes, attends])
    assert config.pattern == f"{period} {period} memory".replace(mixes, f"{mixes} memory", 1)
    assert HydraConfig(**{**SMALL, "num_blocks": 24}).memory_sites() == (4, 12, 20)
    assert HydraConfig(**{**SMALL, "num_blocks": 2}).memory_sites() == (0, 1)
    bare = HydraConfig(**{**SMALL, "attention": None, "experts": None, "memory": None}).model_config()
    assert bare.pattern == " ".join([plain] * 6)


def test_gates_and_shared_weights() -> None:
    model = small()
    first = LanguageModel(model.config)
    values = {
        word: {round(block.layer.gate(word).item(), 6) for block in first.backbone.blocks if _has(block, word)}
        for word in ("state_space", "sparse_attention", "experts")
    }
    assert values == {"state_space": {0.8}, "sparse_attention": {0.2}, "experts": {0.5}}
    names = [spec.name for spec, _, _ in model.backbone.named_layers()]
    assert names.count("workspace") == 2
    assert names.count("product_key_memory") == 3
    assert sum(isinstance(layer, Workspace) for layer in model.backbone.layers()) == 1
    state = model.init_state(1)
    model.step(tokens(1), state)
    spaces = [layer for layer in state.layers if type(layer).__name__ == "WorkspaceState"]
    assert len(spaces) == 2
    assert not torch.equal(spaces[0].gathered, spaces[1].gathered)  # one set of weights, a state each
    hints = [hint.learning_rate for name, hint in parameter_hints(model).items() if name.endswith("values")]
    assert hints == [1e-3]


@pytest.mark.parametrize("mixer", ["mamba3", "hydra_diag", "mamba2"])
def test_pieces_and_tokens_are_the_whole(mixer: str) -> None:
    model = small(mixer=mixer, state_space={} if mixer == "hydra_diag" else SMALL["state_space"]).eval()
    ids = tokens(2, LENGTH)
    whole = model(ids, return_state=True)
    state, pieces = model.init_state(2, max_length=LENGTH), []
    carried = state
    for begin, end in ((0, 5), (5, 6), (6, 17), (17, LENGTH)):
        output = model(ids[:, begin:end], carried, return_state=True)
        pieces.append(output.logits)
        carried = output.state
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, rtol=1e-9, atol=1e-10)
    stepped = torch.stack([model.step(ids[:, t], state) for t in range(LENGTH)], 1)
    torch.testing.assert_close(stepped, whole.logits, rtol=1e-9, atol=1e-10)
    for (name, ours), (_, theirs) in zip(state.canonical().tensors(), carried.canonical().tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_no_token_sees_a_later_one() -> None:
    model = small()  # in training mode
    ids = tokens(1, LENGTH)
    before = model(ids).logits
    for at in (1, 4, 8, 13, 22):
        changed = ids.clone()
        changed[:, at:] = (changed[:, at:] + 7) % 29
        after = model(changed).logits
        torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-12)
        assert (after[:, at:] - before[:, at:]).abs().amax() > 1e-3


def test_the_leaking_router_is_caught() -> None:
    model = small(experts={**SMALL["experts"], "chunk_size": 4, "router_input": "paper_mean"})
    ids = tokens(1, LENGTH)
    changed = ids.clone()
    changed[:, 18:] = (changed[:, 18:] + 7) % 29  # inside a chunk that began at 16
    leak = (model(changed).logits - model(ids).logits)[:, :18].abs().amax()
    assert leak > 1e-6


def test_rows_and_documents_do_not_touch() -> None:
    model, ids = small().eval(), tokens(2, LENGTH)
    together = model(ids).logits
    torch.testing.assert_close(model(ids[1:]).logits, together[1:], rtol=0, atol=1e-12)
    packed = model(ids[:1], layout=Layout.packed([[9, LENGTH - 9]], LENGTH)).logits
    alone = torch.cat([model(ids[:1, :9]).logits, model(ids[:1, 9:]).logits], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-11)


def test_generation_continues_as_the_whole_sequence_would() -> None:
    model = small().float().eval()
    prompts = [[3, 5, 7, 11, 2, 4, 9], [1, 8]]  # left padding
    together = generate(model, prompts, max_new_tokens=9)
    for prompt, text in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in text:
            assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)


def test_every_part_learns_and_gates_of_zero_are_exact() -> None:
    model, ids = small(), tokens(2, LENGTH)
    output = model.loss(ids)
    output.loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    losses = {name for name in output.aux if name.endswith("_loss")}
    assert losses == {"balance_loss", "z_loss"}
    gates = {name for name in output.aux if name.endswith(".gate")}
    assert {"block0.state_space.gate", "block0.experts.gate", "block3.sparse_attention.gate"} <= gates
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gates.sparse_attention" in name:
                parameter.zero_()
    closed = model(ids).logits
    for block in model.backbone.blocks:
        if _has(block, "sparse_attention"):
            block.layer.inactive.add("sparse_attention")
    assert torch.equal(model(ids).logits, closed)


def test_work_and_state_are_linear_in_the_length() -> None:
    model = LanguageModel(load_config(FOLDER / "hydra-toy.yaml"), device="meta")
    assert model.flops(8192) <= 2.1 * model.flops(4096)
    assert model.state_bytes(1000) == model.state_bytes(1_000_000)


PEAK = """
import sys, torch
from seqmodels.models import LanguageModel, HydraConfig
torch.set_num_threads(1)
torch.manual_seed(0)
config = HydraConfig(vocab_size=64, d_model=32, num_blocks=2, attention_every=2, memory_blocks=(1,), mixer="hydra_diag",
    attention=dict(num_heads=2, window=32, num_globals=32, block=32),
    experts=dict(num_experts=2, d_hidden=16, chunk_size=32), workspace=dict(num_slots=4, rank=8, active=2, segment=32),
    memory=dict(num_heads=1, top_k=4, query_dim=16, num_subkeys=8, value_dim=16))
model = LanguageModel(config.model_config())
for length in (64, int(sys.argv[1])):  # once small, so that libraries have what they keep
    ids = torch.randint(64, (1, length))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = int(open("/proc/self/statm").read().split()[1]) * 4096
    model.loss(ids).loss.backward()
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_linear_in_the_length() -> None:
    def peak(length: int) -> int:
        run = subprocess.run([sys.executable, "-c", PEAK, str(length)], capture_output=True, text=True, check=True)
        return int(run.stdout)

    short, long = peak(16384), peak(32768)
    assert long <= 2.1 * short
    assert long < 32768**2 * 4 / 4  # far from any tensor of length x length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workspace": {"segment": 5}}, "workspace.segment is 5 and experts.chunk_size 2; .* for example 6"),
        ({"workspace": {"segment": 8}}, "attention.window is 6 and workspace.segment 8"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"memory_blocks": (6,)}, "memory_blocks has 6; expected blocks 0 to 5"),
        ({"mixer": "mamba4"}, "unknown layer 'mamba4'. Did you mean"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HydraConfig(**{**SMALL, **changes}).model_config()


def test_a_window_below_its_block_is_refused() -> None:
    config = HydraConfig(**{**SMALL, "attention": {"num_heads": 2, "window": 4, "block": 6}}).model_config()
    with pytest.raises(ValueError, match=r"block 3 \(sparse_global_attention\).*window is 4 and block 6"):
        LanguageModel(config, device="meta")


def test_files_name_the_architecture(tmp_path: Path) -> None:
    assert (
        load_config(FOLDER / "hydra-toy.yaml", ["mixer=mamba2", "memory=null"]).layers["state_space"]["layer"]
        == "mamba2"
    )
    path = tmp_path / "model.yaml"
    path.write_text("architecture: hydro\nd_model: 8\n")
    with pytest.raises(ValueError, match="architecture is 'hydro'; expected 'hydra'"):
        load_config(path)
    path.write_text("architecture: hydra\nd_modle: 8\n")
    with pytest.raises(ValueError, match=r"unknown configuration key 'd_modle'\. Did you mean d_model"):
        load_config(path)
    config = load_config(FOLDER / "hydra-toy.yaml")
    again = convert(HydraConfig(**SMALL).model_config(), ModelConfig)
    assert again.layers["state_space"]["path_gate"] == 0.8
    assert SparseGlobalAttention.__name__ in repr(LanguageModel(config, device="meta"))


def _has(block: Any, word: str) -> bool:
    return isinstance(block.layer, Parallel) and word in block.layer.words


def test_the_page_of_the_docs() -> None:
    text = (FOLDER.parents[1] / "docs" / "hydra.md").read_text(encoding="utf-8")
    model, curriculum = (parse_yaml(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    assert convert(write_out(model), ModelConfig) == load_config(FOLDER / "hydra-toy.yaml")
    convert_train_config({"model": model, "steps": 10_000, **curriculum})
