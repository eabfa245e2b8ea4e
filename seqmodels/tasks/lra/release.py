"""ListOps and Pathfinder as Long Range Arena released them: the files of lra_release.gz, unpacked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seqmodels.tasks.lra import listops
from seqmodels.tasks.lra.examples import Examples, gather
from seqmodels.tasks.lra.shards import DataError

if TYPE_CHECKING:
    from types import ModuleType

WHERE = "lra_release.gz (linked from https://github.com/google-research/long-range-arena)"
LISTOPS_SIZES = {"train": 96_000, "val": 2000, "test": 2000}
PATHFINDER_SIZE = 200_000
PATHFINDER_SIDES = (32, 64, 128, 256)
DIFFICULTY = "curv_contour_length_14"  # what all published results use, of three


def places(folder: Path, *inside: str) -> list[Path]:
    """Where the release's folder ``inside`` may lie: in ``folder``, or below what unpacking makes."""
    return [folder.joinpath(*above, *inside) for above in ((), ("lra_release",), ("lra_release", "lra_release"))]


def find_listops(folder: Path) -> Path | None:
    """The folder of basic_train.tsv, if there is one."""
    return next((place for place in places(folder, "listops-1000") if (place / "basic_train.tsv").exists()), None)


def find_pathfinder(folder: Path, side: int) -> Path | None:
    """The folder of the difficulties of this size, if there is one."""
    return next((place for place in places(folder, f"pathfinder{side}") if (place / DIFFICULTY).is_dir()), None)


def load_listops(place: Path) -> tuple[Examples, Examples, Examples]:
    """``basic_{train,val,test}.tsv``: a header, then a tree in brackets, a tab and its value.

    Raises:
        DataError: a missing, cut or damaged file.
    """
    splits = []
    for part, expected in LISTOPS_SIZES.items():
        path = place / f"basic_{part}.tsv"
        if not path.exists():
            raise DataError(f"{path} is missing beside basic_train.tsv; unpack {WHERE} again")
        rows, labels = [], []
        for row, label in _trees(path):
            rows.append(row)
            labels.append(label)
        if len(rows) != expected:
            raise DataError(
                f"{path} has {len(rows)} trees, the released file {expected}: it is cut off or another data set; "
                f"unpack {WHERE} again"
            )
        splits.append(gather(rows, np.array(labels)))
    return splits[0], splits[1], splits[2]


def _trees(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            header = file.readline().rstrip("\r\n")
            if header.split("\t") != ["Source", "Target"]:
                raise DataError(f"{path} begins with {header[:40]!r}; expected the columns Source and Target")
            for number, line in enumerate(file, 2):
                columns = line.rstrip("\r\n").split("\t")
                if len(columns) != 2 or len(columns[1]) != 1 or columns[1] not in "0123456789":
                    raise DataError(
                        f"{path}:{number} ends in {columns[-1][-20:]!r}; expected a tree, a tab and a digit. A cut "
                        f"last line is a partial download; unpack {WHERE} again"
                    )
                tokens = listops.tokenize(columns[0])
                if not tokens or listops.UNKNOWN in tokens:
                    raise DataError(
                        f"{path}:{number} is no tree: it begins with {columns[0][:40]!r}; expected brackets, digits "
                        f"and {', '.join(listops.OPERATORS)}"
                    )
                yield listops.encode(tokens), int(columns[1])
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); it is damaged, unpack {WHERE} again") from None


def load_pathfinder(place: Path, side: int) -> Examples:
    """Pictures and labels in the order of the metadata: ``curv_contour_length_14/metadata/BATCH.npy``, by number.

    Those files are text: a line a picture, its folder, its name, its number and its label first.

    Raises:
        DataError: missing, cut or damaged files.
    """
    image = _pillow(place)
    folder = place / DIFFICULTY
    paths, labels = [], []
    for path, label in _metadata(folder):
        paths.append(path)
        labels.append(label)
    if len(paths) != PATHFINDER_SIZE:
        raise DataError(
            f"the metadata in {folder / 'metadata'} name {len(paths)} pictures, the release {PATHFINDER_SIZE}: it was "
            f"unpacked in part; unpack {WHERE} again"
        )
    pixels = np.empty((len(paths), side * side), dtype=np.uint8)

    def read(index: int) -> None:
        pixels[index] = _picture(image, paths[index], side)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), 10_000):  # in pieces, so that an error is heard soon
            list(pool.map(read, range(start, min(start + 10_000, len(paths)))))
    offsets = np.arange(len(paths) + 1, dtype=np.int64) * side * side
    return Examples(pixels.reshape(-1), offsets, np.array(labels, dtype=np.int64))


def _metadata(folder: Path) -> Iterator[tuple[Path, int]]:
    files = [path for path in (folder / "metadata").glob("*.npy") if path.stem.isdigit()]
    if not files:
        raise DataError(f"{folder / 'metadata'} holds no NUMBER.npy; the release was unpacked in part, unpack it again")
    for path in sorted(files, key=lambda path: int(path.stem)):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not text ({error}); it is damaged, unpack {WHERE} again") from None
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise DataError(
                    f"{path}:{number} is {line[:60]!r}; expected folder, file, number and a label of 0 or 1 between "
                    f"spaces. A cut last line is a partial download; unpack {WHERE} again"
                )
            yield folder / fields[0] / fields[1], int(fields[3])


def _pillow(place: Path) -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError(f"the pictures in {place} are PNG files: pip install pillow") from error
    return Image


def _picture(image: ModuleType, path: Path, side: int) -> np.ndarray:
    try:
        with image.open(path) as file:
            pixels = np.asarray(file.convert("L"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing, but the metadata name it; the release was unpacked in part, unpack {WHERE} again"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is no whole picture ({error}); unpack {WHERE} again") from None
    if pixels.shape != (side, side):
        raise DataError(f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, expected {side} x {side}")
    return pixels.reshape(-1)
