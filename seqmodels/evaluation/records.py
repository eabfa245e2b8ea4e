"""Answers on disk, a line each, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Records:
    """A file of JSON lines: first what was asked of which model, then a line for each finished item.

    A line that a killed run left half written is cut off; every whole line stays.

    Args:
        path: made when missing.
        header: everything that decides the items' results.

    Raises:
        ValueError: the file belongs to another header (each difference is named), or has a damaged line.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.items: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.loads(json.dumps(dict(header)))  # as it will be read back
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if content and not content.startswith(b'{"header"'):
            raise ValueError(f"{path} is not a file of this evaluation: it has no header; give another --out")
        if whole.count(b"\n") < 2:  # nothing is finished: the header may change
            path.write_text(json.dumps({"header": header}) + "\n", encoding="utf-8")
            return
        lines = [self._parse(number, line) for number, line in enumerate(whole.split(b"\n")[:-1], 1)]
        self._compare(lines[0].get("header"), header)
        for number, line in enumerate(lines[1:], 2):
            if "key" not in line:
                raise ValueError(f"{path}:{number} has no key: it is no finished item; delete the line")
            self.items[line["key"]] = line
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def add(self, key: str, **values: Any) -> None:
        """Appends a finished item."""
        line = {"key": key, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.items[key] = line

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number} is not JSON ({error}); delete the line, the others stay") from None
        if not isinstance(found, dict):
            raise ValueError(f"{self.path}:{number} is {type(found).__name__}; expected an object; delete the line")
        return found

    def _compare(self, found: Any, header: Mapping[str, Any]) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"{self.path}:1 is no header; give another --out, or move the file away")
        different = [
            f"{name} is {found.get(name)!r} there, {header.get(name)!r} here"
            for name in sorted(set(found) | set(header))
            if found.get(name) != header.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.path} holds results of something else: {'; '.join(different)}. "
                "Give another --out, or move the file away"
            )
