"""The loaders on tiny files that the tests make: a missing, cut or wrong file is an error that says what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seqmodels.configuration import ConfigError
from seqmodels.tasks.lra import DataError, DataOptions, listops, load_task, release
from seqmodels.tasks.lra.characters import END, UNKNOWN, Characters
from seqmodels.tasks.lra.draws import Draws
from seqmodels.tasks.lra.loaders import _luma
from seqmodels.tasks.lra.splits import torch_permutation


def test_characters():
    characters = Characters(["aab", "abé"], min_count=2)
    assert characters.characters == ["a", "b"]
    assert characters.vocab_size == 5
    assert characters.encode("abz\U0001f600", 10).tolist() == [3, 4, UNKNOWN, UNKNOWN, END]
    assert characters.encode("aaaa", 2).tolist() == [3, 3, END]
    assert characters.encode("", 2).tolist() == [END]


def reviews(folder):
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            (folder / "aclImdb" / split / label).mkdir(parents=True)
            for index in range(3):
                text = f"Good<br />{split}" * 5 if label == "pos" else "bad" * 2000
                (folder / "aclImdb" / split / label / f"{index}_7.txt").write_text(text)


def test_text_from_the_archive(tmp_path):
    reviews(tmp_path)
    data = load_task("text", tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 0, 6)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.lengths.tolist() == [4096] * 3 + [76] * 3  # 4095 characters and the end mark
    assert data.train.row(0)[-1] == END
    # "st" of "test" is not in the training texts 15 times ("s" is in none): unknown, not an error.
    assert UNKNOWN in data.test.row(5)
    assert data.vocab_size == 3 + len(set("bad") | set("Good<br />train"))


def test_text_from_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_dict({"text": ["x" * 20, "y" * 20], "label": [0, 1]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "imdb"))
    data = load_task("text", tmp_path)
    assert data.vocab_size == 5
    assert data.test.labels.tolist() == [0, 1]
    datasets.DatasetDict({"train": part}).save_to_disk(str(tmp_path / "other" / "imdb"))
    with pytest.raises(DataError, match=r"lacks test.text, test.label"):
        load_task("text", tmp_path / "other")


def test_text_errors(tmp_path):
    with pytest.raises(DataError, match=r"aclImdb_v1.tar.gz(.|\n)*save_to_disk"):
        load_task("text", tmp_path)
    reviews(tmp_path)
    broken = tmp_path / "aclImdb" / "train" / "pos" / "0_7.txt"
    broken.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"0_7.txt is not UTF-8"):
        load_task("text", tmp_path)
    for path in broken.parent.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="unpacked in part"):
        load_task("text", tmp_path)


def pairs(folder, lines=("1.0\ta\tb\tfirst text\tsecond", '0.0\tc\td\t"quoted\tthird')):
    (folder / "tsv_data").mkdir()
    for part in ("train", "eval", "test"):
        (folder / "tsv_data" / f"new_aan_pairs.{part}.tsv").write_text("\n".join(lines) + "\n")


def test_retrieval(tmp_path):
    pairs(tmp_path)
    data = load_task("retrieval", tmp_path)
    assert data.train.sequences == 2
    assert data.train.labels.tolist() == [1, 0]
    assert data.train.lengths.tolist() == [11, 7, 8, 6]
    batch = data.test.batch(np.array([1, 0]))
    assert batch.inputs.shape == (2, 2, 11)
    assert batch.labels.tolist() == [0, 1]


def test_retrieval_is_cut_at_4000(tmp_path):
    pairs(tmp_path, ["1.0\ta\tb\t" + "x" * 5000 + "\ty"])
    assert load_task("retrieval", tmp_path).train.lengths.tolist() == [4000, 2]


def test_retrieval_errors(tmp_path):
    with pytest.raises(DataError, match=r"new_aan_pairs.train.tsv.*lra_release.gz"):
        load_task("retrieval", tmp_path)
    pairs(tmp_path, ["1.0\ta\tb\tfirst\tsecond", "0.0\tc\td\tcut"])
    with pytest.raises(DataError, match=r"train.tsv:2 has 4 columns.*partial download"):
        load_task("retrieval", tmp_path)
    (tmp_path / "tsv_data" / "new_aan_pairs.test.tsv").unlink()
    with pytest.raises(DataError, match=r"test.tsv is missing"):
        load_task("retrieval", tmp_path)


def pictures(folder, records=10):
    target = folder / "cifar-10-batches-bin"
    target.mkdir()
    content = np.zeros((records, 3073), dtype=np.uint8)
    content[:, 0] = np.arange(records) % 10
    content[:, 1:1025], content[:, 1025:2049], content[:, 2049:] = 200, 100, 50
    content[:, 2] = 0  # red of the second pixel
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]:
        content.tofile(target / f"{name}.bin")
    return target


def test_image(tmp_path):
    pictures(tmp_path)
    data = load_task("image", tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 5, 10)
    assert data.vocab_size is None
    assert data.test.row(0)[:3].tolist() == [124, 64, 124]  # 0.299 R + 0.587 G + 0.114 B
    assert data.test.labels.tolist() == list(range(10))
    assert sorted(np.concatenate([data.train.labels, data.validation.labels]).tolist()) == sorted([*range(10)] * 5)


def test_image_errors(tmp_path):
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz(.|\n)*save_to_disk"):
        load_task("image", tmp_path)
    target = pictures(tmp_path)
    whole = (target / "test_batch.bin").read_bytes()
    (target / "test_batch.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"test_batch.bin has 30729 bytes, no multiple of 3073"):
        load_task("image", tmp_path)
    (target / "test_batch.bin").write_bytes(b"\x63" + whole[1:])
    with pytest.raises(DataError, match="has label 99"):
        load_task("image", tmp_path)
    (target / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch.bin is missing"):
        load_task("image", tmp_path)


def test_grey_is_that_of_pillow():
    image = pytest.importorskip("PIL.Image")
    colour = (Draws(0, 3).raw() + np.arange(4096 * 3, dtype=np.uint64) * 2654435761 >> 7).astype(np.uint8)
    colour = colour.reshape(64, 64, 3)
    assert np.array_equal(_luma(colour), np.asarray(image.fromarray(colour).convert("L")))


@pytest.mark.parametrize("count", [1, 2, 5, 45, 50_000])
def test_permutation_is_that_of_torch(count):
    for seed in (42, 0, 123456):
        expected = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        assert np.array_equal(torch_permutation(seed, count), expected.numpy())


def test_image_split_is_that_of_random_split(tmp_path):
    target = pictures(tmp_path, records=40)
    for index in range(1, 6):  # a picture's value says which it is
        content = np.fromfile(target / f"data_batch_{index}.bin", dtype=np.uint8).reshape(-1, 3073)
        content[:, 1:] = ((index - 1) * 40 + np.arange(40))[:, None]
        content.tofile(target / f"data_batch_{index}.bin")
    data = load_task("image", tmp_path)
    train, validation = torch.utils.data.random_split(
        range(200), [180, 20], generator=torch.Generator().manual_seed(42)
    )
    assert data.train.values[::1024].tolist() == list(train)
    assert data.validation.values[::1024].tolist() == list(validation)


# ---- the release's ListOps


def trees(folder, counts=(3, 2, 2)):
    place = folder / "lra_release" / "listops-1000"
    place.mkdir(parents=True)
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        rows = [f"( ( ( [MAX {index} ) 9 ) ] )\t9\n" for index in range(count)]
        (place / f"basic_{part}.tsv").write_text("Source\tTarget\n" + "".join(rows))
    return place


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(release, "LISTOPS_SIZES", {"train": 3, "val": 2, "test": 2})
    monkeypatch.setattr(release, "PATHFINDER_SIZE", 20)


def test_released_listops(tmp_path, few):
    trees(tmp_path)
    data = load_task("listops", tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 2, 2)
    assert data.train.labels.tolist() == [9, 9, 9]
    assert listops.source_text(data.train.row(1)) == "( ( ( [MAX 1 ) 9 ) ] )"
    assert data.train.row(1)[-1] == listops.END
    assert data.vocab_size == 18


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Source\tTarget\n( ( ( [MAX 2 ) 9 ) ] )\t9\n( ( [MA", r"basic_val.tsv:3 ends in .*partial download"),
        ("Source\tTarget\n( ( ( [MAX 2 ) 9 ) ] )\t12\n", r"basic_val.tsv:2 ends in '12'"),
        ("Source\tTarget\n( ( ( [AVG 2 ) 9 ) ] )\t2\n", r"basic_val.tsv:2 is no tree.*\[MAX"),
        ("Source\tTarget\n( ( ( [MAX 2 ) 9 ) ] )\t9\n", r"has 1 trees, the released file 2: it is cut off"),
        ("( ( ( [MAX 2 ) 9 ) ] )\t9\n", "expected the columns Source and Target"),
        (b"Source\tTarget\n\xff\xfe", "is not UTF-8 text"),
        (None, r"basic_val.tsv is missing beside basic_train.tsv; unpack lra_release.gz"),
    ],
)
def test_released_listops_errors(tmp_path, few, content, message):
    path = trees(tmp_path) / "basic_val.tsv"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_task("listops", tmp_path)


# ---- the release's Pathfinder


def paths(folder, side=32, count=20):
    """Pictures whose every pixel is their number in the order of batches 2, 10; labels alternate."""
    image = pytest.importorskip("PIL.Image")
    place = folder / f"pathfinder{side}" / "curv_contour_length_14"
    (place / "metadata").mkdir(parents=True)
    for number, batch in enumerate((2, 10)):
        (place / "imgs" / str(batch)).mkdir(parents=True)
        lines = []
        for index in range(count // 2):
            value = number * (count // 2) + index
            picture = image.fromarray(np.full((side, side), value, np.uint8))
            picture.save(place / "imgs" / str(batch) / f"sample_{index}.png")
            lines.append(f"imgs/{batch} sample_{index}.png {index} {value % 2} 1.0 14 4 2 0.5 1 1\n")
        (place / "metadata" / f"{batch}.npy").write_text("".join(lines))
    return place


@pytest.mark.parametrize("side", [32, 64])
def test_released_pathfinder(tmp_path, few, side):
    paths(tmp_path, side)
    data = load_task(f"pathfinder{side}", tmp_path)
    parts = torch.utils.data.random_split(range(20), [16, 2, 2], generator=torch.Generator().manual_seed(42))
    for found, expected in zip(data[:3], parts, strict=True):
        assert found.values.reshape(-1, side * side)[:, 5].tolist() == list(expected)
        assert found.labels.tolist() == [value % 2 for value in expected]
    ordered = load_task(f"pathfinder{side}", tmp_path, DataOptions(split="lra"))
    assert [part.values[:: side * side].tolist() for part in ordered[:3]] == [[*range(16)], [16, 17], [18, 19]]


def test_released_pathfinder_errors(tmp_path, few):
    place = paths(tmp_path)
    picture = place / "imgs" / "10" / "sample_3.png"
    whole, metadata = picture.read_bytes(), (place / "metadata" / "10.npy").read_text()

    def refused(message, name="pathfinder32", options=DataOptions()):  # noqa: B008
        with pytest.raises(DataError, match=message):
            load_task(name, tmp_path, options)

    for damaged in (b"", whole[: len(whole) // 2], b"text", b"\x89PNG\r\n\x1a\n" + b"0" * 40):
        picture.write_bytes(damaged)
        refused(r"sample_3.png is no whole picture")
    picture.write_bytes((paths(tmp_path / "other", 64) / "imgs" / "2" / "sample_0.png").read_bytes())
    refused(r"sample_3.png is 64 x 64 pixels, expected 32 x 32")
    picture.unlink()
    refused(r"sample_3.png is missing, but the metadata name it")
    picture.write_bytes(whole)
    (place / "metadata" / "10.npy").write_text(metadata[:-40])
    refused(r"10.npy:10 is .*expected folder, file, number and a label")
    (place / "metadata" / "10.npy").write_bytes(b"\x93NUMPY\xff\xff")
    refused(r"10.npy is not text")
    (place / "metadata" / "10.npy").unlink()
    refused(r"name 10 pictures, the release 20: it was unpacked in part")
    (place / "metadata" / "2.npy").unlink()
    refused(r"metadata holds no NUMBER.npy")
    refused(r"(?s)no data of pathfinder128 .*evals.lra generate pathfinder128.*lra_release.gz", "pathfinder128")
    refused(r"no data of pathfinder256 .*Unpack lra_release.gz", "pathfinder256")
    refused(r"no data of pathfinder128 .*\. Unpack lra_release.gz", "pathfinder128", DataOptions(source="release"))


def test_options_of_the_data(tmp_path, few):
    trees(tmp_path)
    with pytest.raises(DataError, match=r"no data in .*listops"):
        load_task("listops", tmp_path, DataOptions(source="generated"))
    with pytest.raises(ConfigError, match="task 'image' has no option split=lra; split is for pathfinder32"):
        load_task("image", tmp_path, DataOptions(split="lra"))
    with pytest.raises(ConfigError, match="'listops-256' has no option source=release"):
        load_task("listops-256", tmp_path, DataOptions(source="release"))
    with pytest.raises(ConfigError, match="'pathfinder64' is not generated"):
        load_task("pathfinder64", tmp_path, DataOptions(source="generated"))


def test_digits():
    pytest.importorskip("sklearn")
    data = load_task("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1257, 180, 360)
    assert set(data.test.lengths) == {64}
    assert data.train.values.max() == 255
