"""ListOps and Pathfinder: statistics of the specification, labels by an independent evaluator, shards that survive."""

from __future__ import annotations

import errno
import statistics
import subprocess
import sys

import numpy as np
import pytest

from seqmodels.configuration import ConfigError
from seqmodels.tasks.lra import DataError, Examples, Pixels, generate_task, listops, load_task, shards, task_named
from seqmodels.tasks.lra.draws import Draws
from seqmodels.tasks.lra.examples import gather
from seqmodels.tasks.lra.makers import make_listops
from seqmodels.tasks.lra.pathfinder import SETTINGS, _brush, generate
from seqmodels.tasks.lra.raster import direction, line, reduce, round_up

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
    """Against the specification's 4000 trees; four standard errors, with the deviations of those trees."""
    examples, parsed = trees
    count = len(examples)
    lengths = examples.lengths - 1  # without the end mark
    assert lengths.min() > 500
    assert lengths.max() < 2000
    both = (1 / count + 1 / 4000) ** 0.5
    assert abs(lengths.mean() - 1062) < 4 * lengths.std() * both
    assert abs((lengths < 991).mean() - 0.5) < 4 * 0.5 * both  # the median
    assert {max(depth for _, depth in nodes(tree)) for tree in parsed} == {10}
    frequency = np.bincount(examples.labels, minlength=10) / count
    assert abs(frequency[[0, 9]].sum() - 0.34) < 4 * (0.34 * 0.66) ** 0.5 * both
    operators = [node[0] for tree in parsed for node, _ in nodes(tree) if isinstance(node, list)]
    for operator in OPERATIONS:
        assert abs(operators.count(operator) / len(operators) - 0.25) < 4 * (0.1875 / len(operators)) ** 0.5
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
PATHFINDER_DIGEST = "c5dba1a253ad3aec67d947f6da78a7345b87e48a873e924a95c83532e59c4b4e"


PICTURES = 100
# Mean over pictures, its standard error, and the standard deviation of a picture, of the original script with the
# settings of 32 x 32: 300 pictures with the 8-bit rescaling of its time; the distractors of 400 more.
ORIGINAL = {
    "mean": (0.0782, 0.0004, 0.0073),
    "positive": (0.3374, 0.0022, 0.0382),
    "bright": (0.0840, 0.0005, 0.0085),
    "distractors": (1.17, 0.034, 0.90),
    "label": (0.5, 0.0, 0.5),
}


@pytest.fixture(scope="module")
def pictures():
    return [generate(SETTINGS[32], Draws(0, 5, index)) for index in range(PICTURES)]


@pytest.mark.parametrize("name", ORIGINAL)
def test_pathfinder_statistics_are_those_of_the_original(pictures, name):
    pixels = np.stack([picture.pixels for picture in pictures]).astype(float)
    assert pixels.shape == (PICTURES, 32, 32)
    assert (pixels.min((1, 2)) == 0).all()
    assert (pixels.max((1, 2)) == 255).all()
    found = {
        "mean": pixels.mean() / 255,
        "positive": (pixels > 0).mean(),
        "bright": (pixels > 127).mean(),
        "distractors": np.mean([picture.distractors for picture in pictures]),
        "label": np.mean([picture.label for picture in pictures]),
    }[name]
    mean, error, deviation = ORIGINAL[name]
    # Four standard errors of the difference: false once in 16,000 seeds, were the pictures drawn anew.
    assert abs(found - mean) < 4 * np.hypot(error, deviation / PICTURES**0.5)


def test_pathfinder_paths(pictures):
    settings = SETTINGS[32]
    for picture in pictures:
        first, second = picture.paths
        assert len(first) == len(second) == settings.paddles
        steps = np.linalg.norm(np.diff(np.array(first[1:]), axis=0), axis=1)
        stride = settings.paddle + 2 * settings.margins[0]
        assert (steps <= stride + settings.paddle + 2).all()
        gap = np.hypot(second[0][0] - first[0][0], second[0][1] - first[0][1])
        assert abs(gap - settings.seed_distance) <= 0.5 * 2**0.5 + 1e-9  # both coordinates to the nearest pixel
        assert 0 <= picture.distractors <= settings.distractors


@pytest.mark.parametrize(("side", "share"), [(32, 0.914), (128, 0.0083)])
def test_orientations_that_cannot_begin_a_path(side, share):
    """The specification counts 92 % and 0.8 % of the degrees."""
    brushes = [_brush(SETTINGS[side], margin) for margin in SETTINGS[side].margins]
    failing = [brush.kernel(degrees) is None for brush in brushes for degrees in range(360)]
    assert np.mean(failing) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("width", [1, 3])
def test_lines_and_reduction_are_those_of_pillow(width):
    image, draw = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageDraw")
    side, middle = 37, 18
    for degrees in range(0, 360, 7):
        y, x = (round_up(10 * part) for part in direction(degrees))
        canvas = image.new("L", (side, side), 0)
        draw.Draw(canvas).line([(middle, middle), (middle + x, middle + y)], fill=255, width=width)
        drawn = line(side, (y, x), width)
        assert np.array_equal(np.array(canvas) > 0, drawn)
        small = np.array(canvas.resize((19, 19), image.Resampling.LANCZOS))
        assert np.array_equal(reduce(drawn * 255.0), small)


def test_pathfinder_128_has_its_size():
    picture = generate(SETTINGS[128], Draws(0, 5, 1))
    assert picture.pixels.shape == (128, 128)
    assert 0.015 < picture.pixels.mean() / 255 < 0.06  # 0.031, sd 0.0023 over pictures: a wide mark for a single one


def test_pathfinder_content_does_not_change(pictures):
    """By no library version and no processor: every rounding is of a value that cannot fall on either side."""
    assert shards.digest_of(gather([p.pixels.reshape(-1) for p in pictures], np.zeros(PICTURES))) == PATHFINDER_DIGEST


def test_directions_are_y_x():
    assert np.allclose(direction(90), (1, 0))


# ---- shards

# Trees of length 4: an operator on two digits, 400 in all; three shards of a hundred must share some.
CROWDED = {"task": "listops", "above": 3, "below": 5, "seed": 3}


def make(folder, **options):
    return shards.generate(folder, make_listops, options.pop("settings", SMALL), 25, 10, **options)


def make_crowded(folder, **options):
    return shards.generate(folder, make_listops, CROWDED, 300, 100, distinct=True, **options)


def test_no_tree_twice_in_the_whole_set(tmp_path):
    alone = [make_listops(CROWDED, shard, 100) for shard in range(3)]
    assert len({part.row(row).tobytes() for part in alone for row in range(100)}) < 300
    make_crowded(tmp_path)
    everything = shards.load(tmp_path, CROWDED, "MAKE")
    assert len({everything.row(row).tobytes() for row in range(300)}) == 300
    assert shards.digest_of(shards.read_shard(tmp_path, 0)) == shards.digest_of(alone[0])


@pytest.mark.parametrize("call", range(1, 6))
def test_a_generation_killed_while_repeats_are_replaced_ends_the_same(tmp_path, monkeypatch, call):
    whole = make_crowded(tmp_path / "a")
    calls = []

    def killed(*arguments, make=shards._make):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_make", killed)
        with pytest.raises(KeyboardInterrupt):
            make_crowded(tmp_path / "b")
    with pytest.raises(DataError, match="is not finished"):
        shards.load(tmp_path / "b", CROWDED, "MAKE")
    assert make_crowded(tmp_path / "b") == whole


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


def test_shards_of_two_generations_are_not_mixed(tmp_path):
    make(tmp_path / "a")
    digest = make(tmp_path / "b", settings={**SMALL, "seed": 4})
    (tmp_path / "a" / "shard_00001.npz").write_bytes((tmp_path / "b" / "shard_00001.npz").read_bytes())
    with pytest.raises(DataError, match=f"its manifest.json says (?!{digest}).*not of one generation"):
        shards.load(tmp_path / "a", SMALL, "MAKE")
    with pytest.raises(DataError, match=r"other content.*give another folder"):
        make(tmp_path / "a")


def test_damage_of_any_kind_is_a_clear_error(tmp_path):
    make(tmp_path)
    shard = tmp_path / "shard_00000.npz"
    whole = shard.read_bytes()
    draws = Draws(0, 9)
    kinds = [b"", b"PK", b"\x93NUMPY" + whole[6:], whole[1:], b"\x80\x04" + whole]
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(1 + draws.below(3)):
            content[draws.below(len(whole))] = draws.below(256)
        kinds.append(bytes(content))
    refused = []
    for content in kinds:
        shard.write_bytes(content)
        try:
            shards.load(tmp_path, SMALL, "MAKE")  # some bytes of a .zip mean nothing: then the digest is right
        except DataError as error:
            refused.append(str(error))
    assert all("shard_00000.npz is damaged" in message for message in refused)
    assert len(refused) > len(kinds) / 2


def test_two_processes_do_not_generate_into_one_folder(tmp_path):
    program = (
        "import sys; from pathlib import Path; from seqmodels.tasks.lra import shards\n"
        "with shards._locked(Path(sys.argv[1])):\n  print('mine', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(DataError, match="another process generates into"):
        make(tmp_path)
    other.kill()
    other.wait()
    make(tmp_path)  # the lock of a killed process is gone


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    whole = make(tmp_path / "a")

    def full(file, *arguments, save=np.savez_compressed, **arrays):
        if "00001" in file.name:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, *arguments, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full)
        with pytest.raises(DataError, match=r"cannot write .*shard_00001.npz .*No space left.*make room"):
            make(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [".lock", "manifest.json", "shard_00000.npz"]
    assert make(tmp_path / "b") == whole


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write into .*file"):
        make(tmp_path / "file")


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
    with pytest.raises(DataError, match=r"generate listops --data(.|\n)*lra_release.gz"):
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
