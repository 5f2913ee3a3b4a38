"""What the tiny Idefics3 and SmolVLM have in common: 16 tokens a tile, marks and names between."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import IMAGE, TEXT, pictures, prompts
from torch.nn.functional import pad
from transformers import LlamaConfig

SIDE, EACH, FAKE, WHOLE, LINE, NAMES = 56, 16, 152, 153, 154, 110
VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "image_size": SIDE, "patch_size": 7},
}


def settings() -> dict[str, Any]:
    """Return the settings of a tiny model."""
    return {
        "text_config": LlamaConfig(**TEXT),
        "vision_config": VISION,
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": 0,
    }


def grid(size: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of the crops of an image; one of each where it is not cut."""
    rows, columns = (max(1, round(edge / 50)) for edge in size)
    return rows, columns


def tiles(size: tuple[int, int]) -> int:
    rows, columns = grid(size)
    return 1 if rows * columns == 1 else rows * columns + 1


def image_ids(size: tuple[int, int]) -> list[int]:
    rows, columns = grid(size)
    ids: list[int] = []
    if rows * columns > 1:
        for row in range(rows):
            for column in range(columns):
                ids += [FAKE, NAMES + 6 * row + column, *[IMAGE] * EACH]
            ids.append(LINE)
    return [*ids, FAKE, WHOLE, *[IMAGE] * EACH, FAKE]


def inputs(model: Any, rows: Any, seed: int = 0) -> dict[str, Any]:
    made = prompts(rows, image_ids, seed)
    if not any(rows):
        return made
    pixels = iter(pictures(rows, lambda size: (tiles(size), 3, SIDE, SIDE), seed))
    own = [torch.cat([next(pixels) for _ in row]) if row else torch.zeros(0) for row in rows]
    most = max(map(len, own))
    empty = torch.zeros(most, 3, SIDE, SIDE)
    filled = [
        pad(row, (0, 0, 0, 0, 0, 0, 0, most - len(row))) if len(row) else empty for row in own
    ]
    pixel_values = torch.stack(filled)
    shown = (pixel_values != 0).any(dim=2).long()
    return {**made, "pixel_values": pixel_values, "pixel_attention_mask": shown}
