"""Text, Retrieval and Image from tiny files; a missing, cut or wrong file is an error that says what to do."""

from __future__ import annotations

import numpy as np
import pytest

from seqmodels.tasks.lra import DataError, load_task
from seqmodels.tasks.lra.characters import END, UNKNOWN, Characters


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


def test_digits():
    pytest.importorskip("sklearn")
    data = load_task("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1257, 180, 360)
    assert set(data.test.lengths) == {64}
    assert data.train.values.max() == 255
