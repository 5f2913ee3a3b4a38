"""What the tiny Qwen-VL models have in common: 4 x 4 pixels a patch, 2 x 2 patches a token."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import IMAGE, TEXT, pictures, prompts

MARKS = {
    **{"image_token_id": IMAGE, "video_token_id": 151},
    **{"vision_start_token_id": 152, "vision_end_token_id": 153},
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
LANGUAGE = {**TEXT, "rope_parameters": ROPE}
VISION = {
    **{"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "in_channels": 3},
    **{"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
}


def grid(size: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of the patches of an image: even numbers, at least 4."""
    rows, columns = (max(4, edge // 8 * 2) for edge in size)
    return rows, columns


def inputs(model: Any, rows: Any, seed: int = 0) -> dict[str, Any]:
    def image_ids(size: tuple[int, int]) -> list[int]:
        height, width = grid(size)
        return [152, *[IMAGE] * (height * width // 4), 153]

    made = prompts(rows, image_ids, seed)
    made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).int()
    grids = [(1, *grid(size)) for row in rows for size in row]
    if not grids:
        return made
    patches = pictures(rows, lambda size: (grid(size)[0] * grid(size)[1], 3 * 2 * 4 * 4), seed)
    return {**made, "pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
