"""Pictures of a generated task on one page, for a person to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seqmodels.tasks.lra.shards import read_shard

COLUMNS, ROWS, GAP = 8, 4, 2


def contact_sheet(folder: Path, path: Path) -> Path:
    """``COLUMNS x ROWS`` pictures of the first shard as a PNG, label 1 (connected) in the upper half, 0 below.

    Raises:
        DataError: no shard, or a damaged one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    examples = read_shard(folder, 0)
    side = round(int(examples.lengths[0]) ** 0.5)
    sheet = np.full((ROWS * (side + GAP), COLUMNS * (side + GAP)), 128, dtype=np.uint8)
    half = COLUMNS * ROWS // 2
    for place, label in ((0, 1), (half, 0)):
        for index, row in enumerate(np.flatnonzero(examples.labels == label)[:half], place):
            y, x = (part * (side + GAP) for part in divmod(index, COLUMNS))
            sheet[y : y + side, x : x + side] = examples.row(row).reshape(side, side)
    plt.imsave(path, sheet, cmap="gray", vmin=0, vmax=255)
    return path
