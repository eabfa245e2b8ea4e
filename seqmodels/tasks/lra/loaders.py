"""Text, Retrieval and Image from files on this machine: nothing is downloaded, a missing file is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from seqmodels.tasks.lra.characters import Characters
from seqmodels.tasks.lra.examples import Examples, gather
from seqmodels.tasks.lra.release import WHERE, places
from seqmodels.tasks.lra.shards import DataError
from seqmodels.tasks.lra.splits import SEED, torch_permutation

TEXT_LENGTH, RETRIEVAL_LENGTH = 4096, 4000  # end mark included
TEXT_MIN_COUNT = 15
IMAGE_VALIDATION = 0.1
_RECORD = 1 + 3 * 32 * 32  # of CIFAR-10's binary files: a label and three planes

Splits = tuple[Examples, Examples, Examples]


def load_text(folder: Path) -> tuple[Splits, int]:
    """IMDb reviews as characters, no lowercasing, markup kept; there is no validation split (it is empty).

    ``folder/aclImdb`` (Stanford's archive, unpacked) or ``folder/imdb`` (a saved ``datasets`` data set).
    """
    archive, saved = folder / "aclImdb", folder / "imdb"
    if archive.is_dir():
        parts = {split: list(_reviews(archive / split)) for split in ("train", "test")}
    elif saved.is_dir():
        table = _saved(saved, ("text", "label"), ("train", "test"))
        parts = {
            split: list(zip(table[split]["text"], table[split]["label"], strict=True)) for split in ("train", "test")
        }
    else:
        raise DataError(
            f"Text (IMDb) is neither in {archive} nor in {saved}. Unpack aclImdb_v1.tar.gz of "
            f"https://ai.stanford.edu/~amaas/data/sentiment into {folder} (train/pos/*.txt, train/neg/*.txt, test), "
            f"or run: python -c \"from datasets import load_dataset; load_dataset('stanfordnlp/imdb')"
            f".save_to_disk('{saved}')\""
        )
    characters = Characters((text[: TEXT_LENGTH - 1] for text, _ in parts["train"]), TEXT_MIN_COUNT)
    train, test = (
        gather([characters.encode(text, TEXT_LENGTH - 1) for text, _ in part], np.array([label for _, label in part]))
        for part in (parts["train"], parts["test"])
    )
    return (train, test.select(0, 0), test), characters.vocab_size


def _reviews(folder: Path) -> Iterator[tuple[str, int]]:
    for label, name in enumerate(("neg", "pos")):
        files = sorted((folder / name).glob("*.txt"), key=lambda path: path.name)
        if not files:
            raise DataError(f"{folder / name} holds no *.txt: the archive was unpacked in part; unpack it again")
        for path in files:
            yield _decoded(path), label


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); the file is damaged, unpack it again") from None


def load_retrieval(folder: Path) -> tuple[Splits, int]:
    """Pairs of papers of the ACL anthology network; label 1: one cites the other.

    ``new_aan_pairs.{train,eval,test}.tsv`` in ``folder``, ``folder/tsv_data`` or the release's own folders.
    """
    names = [f"new_aan_pairs.{part}.tsv" for part in ("train", "eval", "test")]
    place = next((place for place in (folder, *places(folder, "tsv_data")) if (place / names[0]).exists()), None)
    if place is None:
        raise DataError(
            f"Retrieval needs {', '.join(names)} in {folder / 'tsv_data'}. They are in "
            f"{WHERE}; five columns between tabs, no header: "
            "label (0.0 or 1.0), id, id, text, text"
        )
    for name in names:
        if not (place / name).exists():
            raise DataError(f"{place / name} is missing beside {names[0]}; unpack the release again")
    characters = Characters(text[: RETRIEVAL_LENGTH - 1] for _, *texts in _pairs(place / names[0]) for text in texts)
    splits = []
    for name in names:
        rows, labels = [], []
        for label, *texts in _pairs(place / name):
            rows += [characters.encode(text, RETRIEVAL_LENGTH - 1) for text in texts]
            labels.append(label)
        splits.append(gather(rows, np.array(labels), sequences=2))
    return (splits[0], splits[1], splits[2]), characters.vocab_size


def _pairs(path: Path) -> Iterator[tuple[int, str, str]]:
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                columns = line.removesuffix("\n").split("\t")
                if len(columns) != 5 or columns[0] not in ("0.0", "1.0", "0", "1"):
                    raise DataError(
                        f"{path}:{number} has {len(columns)} columns, the first {columns[0][:20]!r}; expected five "
                        "between tabs: label (0.0 or 1.0), id, id, text, text. A cut last line is a partial download"
                    )
                yield int(float(columns[0])), columns[3], columns[4]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); it is damaged, unpack the release again") from None


def load_image(folder: Path) -> Splits:
    """CIFAR-10 in grey, 1024 pixels row by row; 5000 of the 50,000 training pictures, as S4's code draws them, are
    for validation.

    ``folder/cifar-10-batches-bin`` (the binary version) or ``folder/cifar10`` (a saved ``datasets`` data set).
    """
    archive, saved = folder / "cifar-10-batches-bin", folder / "cifar10"
    if archive.is_dir():
        train = [_binary(archive / f"data_batch_{index}.bin") for index in range(1, 6)]
        colour = np.concatenate([part[0] for part in train]), _binary(archive / "test_batch.bin")[0]
        labels = np.concatenate([part[1] for part in train]), _binary(archive / "test_batch.bin")[1]
    elif saved.is_dir():
        table = _saved(saved, ("img", "label"), ("train", "test"))
        parts = [table[split] for split in ("train", "test")]
        colour = tuple(np.stack([np.asarray(image.convert("RGB")) for image in part["img"]]) for part in parts)
        labels = tuple(np.array(part["label"]) for part in parts)
    else:
        raise DataError(
            f"Image (CIFAR-10) is neither in {archive} nor in {saved}. Unpack cifar-10-binary.tar.gz of "
            f"https://www.cs.toronto.edu/~kriz/cifar.html into {folder} (data_batch_1.bin to data_batch_5.bin and "
            f'test_batch.bin of 10000 x {_RECORD} bytes), or run: python -c "from datasets import load_dataset; '
            f"load_dataset('uoft-cs/cifar10').save_to_disk('{saved}')\""
        )
    grey = [_luma(part) for part in colour]
    order = torch_permutation(SEED, len(grey[0]))
    cut = len(order) - round(len(order) * IMAGE_VALIDATION)
    train, validation = (_pictures(grey[0][part], labels[0][part]) for part in (order[:cut], order[cut:]))
    return train, validation, _pictures(grey[1], labels[1])


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(pictures, 32, 32, 3) uint8, and labels."""
    if not path.exists():
        raise DataError(f"{path} is missing; unpack cifar-10-binary.tar.gz again")
    content = np.fromfile(path, dtype=np.uint8)
    if len(content) == 0 or len(content) % _RECORD:
        raise DataError(f"{path} has {len(content)} bytes, no multiple of {_RECORD}; it is cut off, unpack it again")
    records = content.reshape(-1, _RECORD)
    if records[:, 0].max() > 9:
        raise DataError(f"{path} has label {records[:, 0].max()}, expected 0 to 9; it is damaged, unpack it again")
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(np.int64)


def _luma(colour: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B, in the 16-bit fractions and with the rounding of Pillow."""
    weighted = colour.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)


def _pictures(grey: np.ndarray, labels: np.ndarray) -> Examples:
    size = grey[0].size
    offsets = np.arange(len(grey) + 1, dtype=np.int64) * size
    return Examples(grey.reshape(-1), offsets, labels.astype(np.int64))


def _saved(path: Path, columns: tuple[str, ...], splits: tuple[str, ...]) -> Any:
    """A data set written by ``save_to_disk``, with the columns and splits that are needed."""
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(f"{path} needs the datasets package: pip install datasets") from error
    try:
        table: Any = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(f"{path} is not a whole saved data set ({error}); delete it and save it again") from None
    lacking = [
        f"{split}.{column}"
        for split in splits
        for column in columns
        if split not in table or column not in table[split].column_names
    ]
    if lacking:
        raise DataError(f"{path} lacks {', '.join(lacking)}; expected splits {splits} with columns {columns}")
    return table
