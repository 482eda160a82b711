"""Reading the small files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if it is damaged, or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download or write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a JSON {type(content).__name__} where an object is expected: download it again."
        )
    return content
