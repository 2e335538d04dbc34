"""MIT's configuration files, as far as they are asked for: ``krb5.conf`` (krb5.conf(5)).

Sections of ``name = value``, with subsections in braces. What is said first counts, as it does for MIT.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Configuration", "configured_files"]

DEFAULT = "/etc/krb5.conf"
LARGEST = 1024 * 1024  # bytes
DEEPEST = 10  # includes in includes
TRUE = frozenset(("y", "yes", "true", "t", "1", "on"))
INCLUDED = re.compile(r"[A-Za-z0-9_-]+|(?!\.).*\.conf")  # of a directory's files (krb5.conf(5))


def configured_files() -> list[Path]:
    """KRB5_CONFIG's files, or the default."""
    return [Path(name) for name in os.environ.get("KRB5_CONFIG", DEFAULT).split(":") if name]


class Configuration:
    """All that the files say. ``missing`` are those that can't be read, each with the reason."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files: list[Path] = []
        self.missing: list[str] = []
        self._entries: list[tuple[tuple[str, ...], str]] = []
        for file in files:
            self._read(file, 0)

    def all(self, *path: str) -> list[str]:
        """Every value: ``all("realms", "EXAMPLE.ORG", "kdc")``."""
        return [value for where, value in self._entries if where == path]

    def first(self, *path: str) -> str | None:
        """The value that counts."""
        return next(iter(self.all(*path)), None)

    def flag(self, *path: str, default: bool) -> bool:
        """A boolean; what isn't one counts as false, as for MIT."""
        value = self.first(*path)
        return default if value is None else value.lower() in TRUE

    def _read(self, file: Path, depth: int) -> None:
        try:
            with open(file, encoding="utf-8", errors="replace") as opened:
                text = opened.read(LARGEST)
        except OSError as error:
            self.missing.append(f"{file}: {error.strerror or error}")
            return
        self.files.append(file)
        where: list[str] = []
        for line in map(str.strip, text.splitlines()):
            word, _, rest = line.partition(" ")
            if not line or line[0] in "#;":
                continue
            if word in ("include", "includedir") and depth < DEEPEST:
                for included in files_of(word, Path(rest.strip())):
                    self._read(included, depth + 1)
            elif line[0] == "[":
                where = [line[1:].partition("]")[0].strip()]
            elif line[0] == "}":
                del where[max(1, len(where) - 1) :]  # a section ends only where the next one begins
            elif "=" in line:
                self._relation(where, line)

    def _relation(self, where: list[str], line: str) -> None:
        name, _, value = line.partition("=")
        name, value = name.strip().rstrip("*"), value.strip()
        if value == "{":
            where.append(name)
        else:
            self._entries.append(((*where, name), value.strip('"')))


def files_of(word: str, path: Path) -> list[Path]:
    if word == "include":
        return [path]
    try:
        return sorted(entry for entry in path.iterdir() if INCLUDED.fullmatch(entry.name) and entry.is_file())
    except OSError:
        return [path]  # which can't be read either, and is reported
