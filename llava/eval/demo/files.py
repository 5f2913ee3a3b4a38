"""Writing the kinds of file that benchmarks are published in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from llava.eval.demo.source import picture

SHORT = "Answer the question using a single word or phrase."
OPTION = "Answer with the option's letter from the given choices directly."
OPTION_CN = "请直接回答选项字母。"


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def write_picture(path: Path, number: int) -> None:
    """Scene `number` as a JPEG, or a PNG where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(encoded(number, "PNG" if path.suffix == ".png" else "JPEG"))


@lru_cache(maxsize=256)
def encoded(number: int, kind: str) -> bytes:
    """The bytes of an image file of scene `number`."""
    buffer = BytesIO()
    picture(number).save(buffer, kind, quality=95)
    return buffer.getvalue()


def lettered(options: Iterable[str]) -> str:
    """`A. red`, `B. blue`, ... one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=False))
