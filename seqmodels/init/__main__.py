"""``python -m seqmodels.init --sizes N ...``: solves for PTD matrices and writes the files that ship."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from seqmodels.init import storage
from seqmodels.init.ptd import solve
from seqmodels.init.settings import default_settings


def main(arguments: list[str] | None = None) -> None:
    """Solves for each size and writes the shipped file."""
    parser = argparse.ArgumentParser(prog="python -m seqmodels.init", description=main.__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", required=True, metavar="N")
    parser.add_argument(
        "--out", type=Path, default=storage.SHIPPED, metavar="DIR", help="the package's own folder by default"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for size in options.sizes:
        settings = default_settings(size)
        found = solve(size, settings)
        path = options.out / storage.shipped_path(size).name
        storage.save_entry(path, found.perturbation, settings)
        print(
            f"{path}: kappa {found.condition:.4g}, ||E||/||A|| {found.relative_size:.4g}, error {found.error:.4g}, "
            f"max Re lambda {found.largest_real_part:.4g}"
        )


if __name__ == "__main__":
    main()
