"""Curricula: what runs, what moves and how fast in each stage, and going on in the middle of one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_cases import tiny_config, tiny_data

from seqmodels.channel import ChunkMoE
from seqmodels.configuration import ConfigError
from seqmodels.models import LanguageModel, load_model, save_model
from seqmodels.models.running_parts import RunningParts, running_parts, set_running_parts
from seqmodels.training.config import TrainConfig, convert_train_config, load_train_config
from seqmodels.training.curriculum import Curriculum, check_carried_ramps
from seqmodels.training.data import load_text
from seqmodels.training.loop import train
from seqmodels.training.reading import reading_plan
from seqmodels.training.run_folder import RunFolder

CONFIGS = Path(__file__).parents[2] / "configs" / "train"
MODEL = {
    "architecture": "hydra",
    "vocab_size": 256,
    "d_model": 16,
    "num_blocks": 2,
    "attention_every": 2,
    "memory_blocks": [1],
    "mixer": "hydra_diag",
    "attention": {"num_heads": 2, "window": 8, "num_globals": 16, "block": 8},
    "experts": {"num_experts": 3, "d_hidden": 8, "chunk_size": 8},
    "workspace": {"num_slots": 4, "rank": 4, "active": 2, "segment": 8},
    "memory": {"num_heads": 1, "top_k": 2, "query_dim": 4, "num_subkeys": 4, "value_dim": 4},
}
STAGES: list[dict[str, Any]] = [
    {"name": "state space", "share": 0.25, "activates": ["experts"], "dense": ["experts"]},
    {
        "name": "attention", "share": 0.25, "activates": ["sparse_attention"], "dense": ["experts"],
        "older_factor": 0.1, "older_steps": 2,
        "ramps": [
            {"part": "sparse_attention", "start": 0.0, "end": 0.2, "steps": 2},
            {"part": "sparse_attention", "quantity": "num_globals", "start": 0, "end": 16, "after": 1, "steps": 2},
        ],
    },
    {
        "name": "experts", "share": 0.25, "copy_expert": {"experts": 0.01}, "older_factor": 0.1, "older_steps": 1,
        "ramps": [{"part": "experts", "quantity": "temperature", "start": 2.0, "end": 1.0, "steps": 2}],
    },
    {"name": "memories", "share": 0.25, "activates": ["workspace", "memory"], "older_factor": 0.0, "older_steps": 1},
]  # fmt: skip


EVERY: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 100}, "validate_every": 1}


def config(folder: Path, stages: Any = STAGES, **changes: Any) -> TrainConfig:
    values = {"model": MODEL, "curriculum": {"stages": stages}, "steps": 12, "log_every": 1, **changes}
    return tiny_config(folder, **values)


def make(stages: Any = STAGES, steps: int = 12) -> tuple[LanguageModel, Curriculum]:
    made = convert_train_config(tiny_data(Path("unused"), model=MODEL, curriculum={"stages": stages}, steps=steps))
    torch.manual_seed(0)
    model = LanguageModel(made.model)
    assert made.curriculum is not None
    return model, Curriculum(made.curriculum, model, steps, seed=0)


def running(model: LanguageModel) -> set[str]:
    ids = torch.randint(256, (2, 19))
    model.zero_grad()
    model.loss(ids).loss.backward()
    found = set()
    for name, parameter in model.named_parameters():
        for part, place in {
            "experts": "blocks.0.layer.paths.1", "router": "router", "sparse_attention": "blocks.1.layer.paths.1",
            "workspace": "read_query", "memory": "subkeys",
        }.items():  # fmt: skip
            if place in name and parameter.grad is not None:
                found.add(part)
    return found


def test_stages_switch_their_parts_on() -> None:
    model, curriculum = make()
    expected = [{"experts"}] * 3 + [{"experts", "sparse_attention"}] * 3
    expected += [{"experts", "router", "sparse_attention"}] * 3
    expected += [{"experts", "router", "sparse_attention", "workspace", "memory"}] * 3
    for step, parts in enumerate(expected):
        curriculum.begin(step)
        assert running(model) == parts, step


def test_ramps_end_where_the_model_is_configured() -> None:
    model, curriculum = make()
    attention = model.backbone.blocks[1].layer
    experts = model.backbone.blocks[0].layer.paths[1]
    gates, globals_, temperatures = [], [], []
    for step in range(12):
        curriculum.begin(step)
        gates.append(round(attention.gate("sparse_attention").item(), 6))
        globals_.append(attention.paths[1].num_globals)
        temperatures.append(experts.temperature)
    assert gates == [0.2] * 3 + [0.0, 0.1, 0.2] + [0.2] * 6  # before its stage the path does not run
    assert globals_ == [16] * 3 + [0, 0, 8] + [16] * 6
    assert temperatures == [1.0] * 6 + [2.0, 1.5, 1.0] + [1.0] * 3
    assert isinstance(globals_[5], int)


def test_a_ramp_ends_at_the_configured_number_to_the_last_bit() -> None:
    """3 + (0.1 - 3) is not 0.1: a finished run would be taken for one in the middle of its ramp."""
    stages: list[dict[str, Any]] = [
        {"name": "all", "share": 1.0, "ramps": [
            {"part": "experts", "quantity": "temperature", "start": 3.0, "end": 0.1, "steps": 2},
        ]},
    ]  # fmt: skip
    colder = {**MODEL, "experts": {**MODEL["experts"], "temperature": 0.1}}
    made = convert_train_config(tiny_data(Path("unused"), model=colder, curriculum={"stages": stages}, steps=4))
    assert made.curriculum is not None
    model = LanguageModel(made.model)
    curriculum = Curriculum(made.curriculum, model, 4, seed=0)
    configured = []
    for step in range(4):
        curriculum.begin(step)
        configured.append(running_parts(model).as_configured)
    assert configured == [False, False, True, True]


def test_learning_rates_of_old_and_new_weights() -> None:
    _, curriculum = make()
    base, space, gate = ("", False), ("state_space", False), ("sparse_attention", True)
    attention, experts, memory = (("sparse_attention", False), ("experts", False), ("memory", False))

    def factors(step: int) -> list[float]:
        return [curriculum.factor(part, step) for part in (base, space, attention, gate, experts, memory)]

    assert factors(0) == [1.0] * 6
    assert factors(3) == [0.1, 0.1, 1.0, 0.0, 0.1, 0.1]
    assert factors(5) == [1.0] * 6  # the gate's ramp is over
    assert factors(6) == [0.1, 0.1, 0.1, 0.1, 1.0, 0.1]  # experts are new: no longer one
    assert factors(9) == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_one_dense_expert_then_copies_of_it() -> None:
    model, curriculum = make()
    layer = model.backbone.blocks[0].layer.paths[1]
    assert isinstance(layer, ChunkMoE)
    x = torch.randn(2, 19, 16)
    curriculum.begin(0)
    output = layer(x, return_state=True)
    gate, up = (x @ layer.in_weight[0].T).chunk(2, -1)
    torch.testing.assert_close(output.y, torch.nn.functional.silu(gate) * up @ layer.out_weight[0].T)
    assert output.aux == {}  # no decision, no loss: the router must not pull at what is below
    state = layer.init_state(2)
    stepped = torch.stack([layer.step(x[:, t], state) for t in range(19)], 1)
    torch.testing.assert_close(stepped, output.y)
    before = layer.in_weight.detach().clone()
    curriculum.begin(6)
    after = layer.in_weight.detach()
    assert torch.equal(after[0], before[0])
    for copy in after[1:]:
        noise = (copy - before[0]) / before[0].std()
        assert 0.008 < noise.std() < 0.012  # 1 %, of 256 draws
    assert set(layer(x).aux) >= {"balance_loss", "z_loss"}
    again, other = make()
    other.begin(6)
    assert torch.equal(again.backbone.blocks[0].layer.paths[1].in_weight[1:], after[1:])


def test_what_does_not_run_does_not_move(tmp_path: Path) -> None:
    result = train(config(tmp_path, checkpoint={"every": 1, "keep": 100}), tmp_path / "run")
    saved = {int(path.name[5:]): load_file(path / "model.safetensors") for path in result.run.checkpoints.iterdir()}

    def moved(begin: int, end: int) -> set[str]:
        return {name for name in saved[begin] if not torch.equal(saved[begin][name], saved[end][name])}

    waiting = ("workspace", "memory")
    names = {block.word: f"backbone.blocks.{index}." for index, block in _plain_blocks(result.model)}
    for word in waiting:
        assert not {name for name in moved(1, 9) if name.startswith(names[word])}
        assert {name for name in moved(9, 10) if name.startswith(names[word])}
    memories = tuple(names[word] for word in waiting)
    assert all(name.startswith(memories) for name in moved(9, 10))  # the others are frozen for a step
    assert any(not name.startswith(memories) for name in moved(10, 11))
    assert not [name for name in moved(1, 3) if "blocks.1.layer.paths.1" in name]  # attention in stage 1
    assert [row["stage"] for row in result.run.rows() if "stage" in row][::3] == [stage["name"] for stage in STAGES]
    gates = [row["gates"]["sparse_attention"] for row in result.run.rows() if "stage" in row]
    assert gates[3] == [0.0]
    assert gates[4] == [pytest.approx(0.1)]


@pytest.mark.parametrize("stopped", [4, 6, 7, 10])
def test_going_on_in_the_middle_of_a_stage_is_bit_exact(tmp_path: Path, stopped: int, whole_run: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name[5:]) > stopped:
            shutil.rmtree(path)
    train(config(whole_run.parent, **EVERY), tmp_path / "run", resume=True)
    for name in ("model", "optimizer"):
        place = f"checkpoints/step_00000012/{name}.safetensors"
        ours, theirs = load_file(tmp_path / "run" / place), load_file(whole_run / place)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return train(config(folder, **EVERY), folder / "run").run.path


@pytest.mark.parametrize(
    ("step", "waiting", "said"),
    [
        (2, ("sparse_attention", "workspace", "memory"), "expert 0 alone in experts"),
        (6, ("workspace", "memory"), "sparse_attention.num_globals=8"),
        (7, ("workspace", "memory"), "experts.temperature=2"),
        (12, (), ""),
    ],
)
def test_a_checkpoint_is_loaded_as_it_was_trained(
    step: int, waiting: tuple[str, ...], said: str, whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The held-out loss of the loaded model is that which the run itself measured at the step."""
    folder = whole_run / "checkpoints" / f"step_{step:08d}"
    loaded = load_model(folder)
    running = running_parts(loaded.model)
    assert running.waiting == waiting
    assert said in caplog.text
    assert bool(caplog.records) == bool(said)
    assert (folder / "parts.yaml").exists() == bool(said)
    made = RunFolder(whole_run).config()
    text = load_text(made.data, seed=made.seed, vocab_size=256).validation
    assert text is not None
    batch = text.batch(0, min(8, text.rows_per_epoch))

    def loss(model: LanguageModel) -> float:
        output = model.loss(batch.tokens, batch.targets, layout=batch.layout())
        return float(output.cross_entropy / output.num_targets)

    measured = {row["step"]: row["validation_loss"] for row in RunFolder(whole_run).rows() if "validation_loss" in row}
    assert loss(loaded.model) == pytest.approx(measured[step], rel=1e-6)  # a mean over batches of 4 rows
    again = load_model(save_model(loaded.model, tmp_path / "saved")).model
    assert loss(again) == loss(loaded.model)
    if said:
        set_running_parts(loaded.model, RunningParts())
        assert loss(loaded.model) != pytest.approx(measured[step], rel=1e-6)


def test_parts_that_the_model_does_not_have_are_refused() -> None:
    model, _ = make()
    with pytest.raises(ConfigError, match=r"no part 'memroy'. Did you mean memory"):
        set_running_parts(model, RunningParts(waiting=("memroy",)))
    with pytest.raises(ConfigError, match="no layer of 'memory' has a number 'temprature'"):
        set_running_parts(model, RunningParts(arguments={"memory": {"temprature": 2.0}}))


def test_only_what_has_not_learned_may_lack_moments() -> None:
    _, curriculum = make()
    assert not curriculum.untrained(12)
    late = curriculum.untrained(9)
    assert late
    assert all("blocks.2" in name or "blocks.3" in name for name in late)
    assert any("router" in name for name in curriculum.untrained(6))
    assert not any("router" in name for name in curriculum.untrained(7))


def changed(index: int, **values: Any) -> list[dict[str, Any]]:
    return [{**stage, **(values if number == index else {})} for number, stage in enumerate(STAGES)]


def ramp(**values: Any) -> list[dict[str, Any]]:
    return [{"part": "sparse_attention", "start": 0.0, "end": 0.2, "steps": 2, **values}]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "curriculum.stages is empty"),
        (changed(0, share=0.3), "add up to 1.05; expected 1"),
        (
            changed(3, activates=["memroy"]),
            r"stages.3 \(memories\): the model has no part 'memroy'. Did you mean memory",
        ),
        (changed(3, activates=["experts"]), "'experts' is activated 2 times"),
        (changed(0, dense=["state_space"]), r"'state_space' \(hydra_diag\) has no experts"),
        (changed(0, copy_expert={"experts": 0.01}), "in the first stage copies an expert that has learned nothing"),
        (changed(0, older_steps=1), "no weight is older than the first stage"),
        (changed(1, older_steps=4), "older_steps is 4, but the stage has 3 steps"),
        (changed(0, ramps=ramp()), "a ramp of 'sparse_attention', which does not run yet"),
        (changed(1, ramps=ramp(steps=4)), "takes 4 steps, the stage 3 of steps=12"),
        (changed(1, ramps=ramp(quantity="num_globals", end=8)), "ends at 8, but the model is configured with 16"),
        (changed(1, ramps=ramp(quantity="globals")), "no layer of this part has a number 'globals'"),
        (changed(3, ramps=ramp(part="memory")), "'memory' has no gate; .* such as path_gate: 0.0"),
        (changed(1, ramps=ramp() + ramp(start=0.1)), "2 ramps of sparse_attention.gate, of which the last alone"),
        ([*changed(0, share=0.01), {"name": "rest", "share": 0.24}], "a share of 0.01 of steps=12 is no step"),
        (changed(0, share=-0.1), "share"),
        (changed(0, activate=["experts"]), "'curriculum.stages.*activate'.*activates|unknown.*activate"),
    ],
)
def test_refusals(tmp_path: Path, stages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_train_config(tiny_data(tmp_path, model=MODEL, curriculum={"stages": stages}, steps=12))


def test_a_ramp_that_changes_the_size_of_a_carried_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages.1 \(attention\): the ramp of sparse_attention.num_globals changes"):
        train(config(tmp_path, changed(1, carry_state=True)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    cooled = config(tmp_path, changed(2, carry_state=True))  # a temperature changes no size
    assert cooled.curriculum is not None
    check_carried_ramps(cooled.curriculum, LanguageModel(cooled.model), reading_plan(cooled))


def test_a_model_without_the_part_is_refused(tmp_path: Path) -> None:
    bare = {**MODEL, "memory": None}
    with pytest.raises(ConfigError, match="the model has no part 'memory'"):
        convert_train_config(tiny_data(tmp_path, model=bare, curriculum={"stages": STAGES}, steps=12))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("hydra*.yaml")), ids=lambda path: path.stem)
def test_shipped_curricula(path: Path) -> None:
    loaded = load_train_config(path)
    assert loaded.curriculum is not None
    assert [stage.share for stage in loaded.curriculum.stages] == [0.35, 0.2, 0.25, 0.1, 0.1]
    assert {word for stage in loaded.curriculum.stages for word in stage.activates} == {
        "sparse_attention", "experts", "workspace", "memory",
    }  # fmt: skip
    spans = reading_plan(loaded)
    assert len({span.rows * span.row_length for span in spans}) == 1
    assert [span.carry for span in spans] == [False] * 3 + [True] * 2
    assert [span.windows > 1 for span in spans] == [False] * 3 + [True] * 2
    assert spans[1].sequence_length == 2 * spans[0].sequence_length


def _plain_blocks(model: LanguageModel) -> list[tuple[int, Any]]:
    specs = zip(model.backbone.order, model.backbone.specs, strict=True)
    return [(index, spec.paths[0]) for index, spec in specs if len(spec.paths) == 1]
