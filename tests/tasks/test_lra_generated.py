"""ListOps and Pathfinder: statistics of the specification, labels by an independent evaluator, shards that survive."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from seqmodels.configuration import ConfigError
from seqmodels.tasks.lra import DataError, Examples, Pixels, generate_task, listops, load_task, shards, task_named
from seqmodels.tasks.lra.draws import Draws
from seqmodels.tasks.lra.makers import make_listops
from seqmodels.tasks.lra.pathfinder import SETTINGS, generate
from seqmodels.tasks.lra.raster import direction

SMALL = {"task": "listops", "above": 5, "below": 60, "seed": 3}
OPERATIONS = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def parse(source):
    """The nested tree of the release's notation, from its words alone."""
    stack = [[]]
    for word in source.replace("(", " ").replace(")", " ").split():
        if word.startswith("["):
            stack.append([word])
        elif word == "]":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(int(word))
    ((tree,),) = stack
    return tree


def evaluate(tree):
    return tree if isinstance(tree, int) else OPERATIONS[tree[0]]([evaluate(child) for child in tree[1:]])


def nodes(tree, depth=1):
    yield tree, depth
    if isinstance(tree, list):
        for child in tree[1:]:
            yield from nodes(child, depth + 1)


@pytest.fixture(scope="module")
def trees():
    examples = listops.generate(400, listops.Lengths(), Draws(0, 77))
    return examples, [parse(listops.source_text(examples.row(index))) for index in range(len(examples))]


def test_draws_are_those_of_every_version():
    draws = Draws(0, 1)
    assert [draws.raw() for _ in range(2)] == [int(v) for v in np.random.PCG64([0, 1]).random_raw(2)]
    assert [Draws(0, 1).below(1000), round(Draws(5).uniform(), 12)] == [889, 0.805002923745]
    chosen = [Draws(1, index).weighted(np.array([0.0, 3.0, 0.0, 1.0])) for index in range(400)]
    assert set(chosen) == {1, 3}
    assert 0.68 < chosen.count(1) / 400 < 0.82


def test_every_label_is_what_an_independent_evaluator_says(trees):
    examples, parsed = trees
    assert [evaluate(tree) for tree in parsed] == examples.labels.tolist()


def test_listops_statistics(trees):
    examples, parsed = trees
    lengths = examples.lengths - 1  # without the end mark
    assert lengths.min() > 500
    assert lengths.max() < 2000
    assert 980 < lengths.mean() < 1140  # 1062, sd of the mean about 20
    assert 860 < np.median(lengths) < 1110  # 991
    assert {max(depth for _, depth in nodes(tree)) for tree in parsed} == {10}
    frequency = np.bincount(examples.labels, minlength=10) / len(examples)
    assert 0.26 < frequency[[0, 9]].sum() < 0.42  # 0.34
    operators = [node[0] for tree in parsed for node, _ in nodes(tree) if isinstance(node, list)]
    for operator in OPERATIONS:
        assert abs(operators.count(operator) / len(operators) - 0.25) < 0.01
    children = [len(node) - 1 for tree in parsed for node, depth in nodes(tree) if isinstance(node, list) and depth > 3]
    assert set(children) == set(range(2, 11))


def test_listops_notation_and_tokens():
    source = "( ( ( [MAX 2 ) 9 ) ] )"
    tokens = listops.tokenize(source)
    assert listops.source_text(tokens) == source
    assert [listops.SYMBOLS[token - 3] for token in tokens] == ["[MAX", "2", "9", "X"]
    assert listops.tokenize("[FOO 1")[0] == listops.UNKNOWN
    assert len(listops.encode(tokens * 1000)) == 2048
    assert listops.encode(tokens * 1000)[-1] == listops.END
    assert listops.VOCAB_SIZE == 18


def test_listops_content_does_not_change():
    assert shards.digest_of(make_listops(SMALL, 0, 20)) == LISTOPS_DIGEST


LISTOPS_DIGEST = "1b8d6c7d823cfd04b223a81a38b2d1f508c1de80f1a00a336792ab300de296de"
PATHFINDER_DIGEST = "fb1c368fcd1f4bd3e66b37fb85c40aa6a618a4370a530aaa18bfe2a5d7963ec2"


@pytest.fixture(scope="module")
def pictures():
    return [generate(SETTINGS[32], Draws(0, 5, index)) for index in range(80)]


def test_pathfinder_statistics(pictures):
    pixels = np.stack([picture.pixels for picture in pictures]).astype(float)
    assert pixels.shape == (80, 32, 32)
    assert (pixels.min((1, 2)) == 0).all()
    assert (pixels.max((1, 2)) == 255).all()
    assert abs(pixels.mean() / 255 - 0.080) < 0.006
    assert abs((pixels > 0).mean() - 0.344) < 0.03
    assert abs((pixels > 127).mean() - 0.085) < 0.008
    assert 0.3 < np.mean([picture.label for picture in pictures]) < 0.7


def test_pathfinder_paths(pictures):
    settings = SETTINGS[32]
    for picture in pictures:
        first, second = picture.paths
        assert len(first) == len(second) == settings.paddles
        steps = np.linalg.norm(np.diff(np.array(first[1:]), axis=0), axis=1)
        stride = settings.paddle + 2 * settings.margins[0]
        assert (steps <= stride + settings.paddle + 2).all()
        gap = np.hypot(second[0][0] - first[0][0], second[0][1] - first[0][1])
        assert abs(gap - settings.seed_distance) < 1.5
        assert 0 <= picture.distractors <= settings.distractors
    counts = [picture.distractors for picture in pictures]
    assert 0.5 < np.mean(counts) < 2.5  # not 5: the quirk of the original


def test_pathfinder_128_has_its_size():
    picture = generate(SETTINGS[128], Draws(0, 5, 1))
    assert picture.pixels.shape == (128, 128)
    assert 0.015 < picture.pixels.mean() / 255 < 0.06


def test_pathfinder_content_does_not_change(pictures):
    examples = Examples(pictures[0].pixels.reshape(-1), np.array([0, 1024]), np.array([pictures[0].label]))
    assert shards.digest_of(examples) == PATHFINDER_DIGEST


def test_directions_are_y_x():
    assert np.allclose(direction(90), (1, 0))


# ---- shards


def make(folder, **options):
    return shards.generate(folder, make_listops, options.pop("settings", SMALL), 25, 10, **options)


def test_a_killed_generation_goes_on_and_makes_the_same_data(tmp_path):
    whole = make(tmp_path / "a")
    heard = []

    def kill(finished, total):
        heard.append((finished, total))
        if finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b", done=kill)
    with pytest.raises(DataError, match=r"1 of 3 shards are missing; go on with: MAKE"):
        shards.load(tmp_path / "b", SMALL, "MAKE")
    before = (tmp_path / "b" / "shard_00000.npz").stat().st_mtime_ns
    assert make(tmp_path / "b") == whole
    assert (tmp_path / "b" / "shard_00000.npz").stat().st_mtime_ns == before
    assert heard == [(0, 3), (1, 3), (2, 3)]
    assert len(shards.load(tmp_path / "b", SMALL, "MAKE")) == 25


def test_processes_do_not_change_the_data(tmp_path):
    assert make(tmp_path / "a") == make(tmp_path / "b", jobs=2)


def test_a_damaged_shard_is_named_and_made_again_once_deleted(tmp_path):
    digest = make(tmp_path)
    shard = tmp_path / "shard_00001.npz"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"shard_00001.npz is damaged .* delete it and generate again"):
        shards.load(tmp_path, SMALL, "MAKE")
    with pytest.raises(DataError, match="shard_00001"):
        make(tmp_path)
    shard.unlink()
    assert make(tmp_path) == digest


def test_a_shard_with_other_content_is_refused(tmp_path):
    make(tmp_path)
    path = tmp_path / "shard_00000.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["labels"] = arrays["labels"].copy()
    arrays["labels"][0] = (arrays["labels"][0] + 1) % 10
    np.savez_compressed(path, **arrays)
    with pytest.raises(DataError, match="another digest"):
        shards.load(tmp_path, SMALL, "MAKE")


def test_data_of_other_settings_are_not_overwritten(tmp_path):
    make(tmp_path)
    before = (tmp_path / "shard_00000.npz").read_bytes()
    with pytest.raises(DataError, match=r"seed: 3 != 4.*nothing was overwritten"):
        make(tmp_path, settings={**SMALL, "seed": 4})
    with pytest.raises(DataError, match="seed: 3 != 4"):
        shards.load(tmp_path, {**SMALL, "seed": 4}, "MAKE")
    assert (tmp_path / "shard_00000.npz").read_bytes() == before
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        make(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds shards but no manifest"):
        make(tmp_path)


# ---- tasks by name, batches


def test_unknown_and_ungenerated_tasks():
    with pytest.raises(ConfigError, match=r"unknown task 'listop'. Did you mean listops"):
        task_named("listop")
    with pytest.raises(ConfigError, match="'image' is not generated, it is loaded"):
        generate_task("image")


def test_missing_data_say_how_to_make_them(tmp_path):
    with pytest.raises(DataError, match=r"python -m evals.lra generate listops --data"):
        load_task("listops", tmp_path)


def test_batches_pad_on_the_right():
    examples = Examples(np.array([5, 6, 7, 8], np.uint8), np.array([0, 1, 4]), np.array([1, 0]))
    batch = examples.batch(np.array([1, 0]))
    assert batch.inputs.tolist() == [[6, 7, 8], [5, 0, 0]]
    assert batch.labels.tolist() == [0, 1]
    assert batch.layout is not None
    assert batch.layout.lengths.tolist() == [3, 1]
    assert examples.batch(np.array([0])).layout is None
    pixels = examples.batch(np.array([0]), Pixels(0.5, 0.25))
    assert pixels.inputs.shape == (1, 1, 1)
    assert pixels.inputs.item() == pytest.approx((5 / 255 - 0.5) / 0.25)
    pairs = Examples(*examples[:2], np.array([1]), sequences=2)
    assert pairs.batch(np.array([0])).inputs.tolist() == [[[5, 0, 0], [6, 7, 8]]]
    assert pairs.take(np.array([0])).lengths.tolist() == [1, 3]
