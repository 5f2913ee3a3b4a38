"""Images in every form that a model takes, as one batch of tiles."""

import hashlib

import torch

from llava.utils import UserInputError

Images = torch.Tensor | list[torch.Tensor]


def flatten_tiles(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring every accepted form of ``images`` into one batch.

    Returns:
        Pixels [T, 3, H, W] or features [T, N, Dv], and the int64 [T] image of each tile.

    Raises:
        UserInputError: no images, shapes that do not fit together, or too few dimensions.
    """
    if isinstance(images, torch.Tensor) and images.ndim in (3, 4):
        return images, torch.arange(len(images))
    stacks = [image if image.ndim == 4 else image.unsqueeze(0) for image in images]
    if not stacks or any(
        s.ndim not in (3, 4) or s.shape[1:] != stacks[0].shape[1:] for s in stacks
    ):
        raise UserInputError(
            "images must be pixels [B, 3, H, W], [B, T, 3, H, W] or a list of [3, H, W] or "
            "[T, 3, H, W] tensors of one size (tower features: [B, N, C] or a list of [N, C]); "
            f"got shapes {[tuple(image.shape) for image in images]}"
        )
    counts = torch.tensor([len(stack) for stack in stacks])
    return torch.cat(stacks), torch.arange(len(stacks)).repeat_interleave(counts)


def tile_digest(tile: torch.Tensor) -> int:
    """A number that depends on the content of a tile only, not on its batch or device."""
    data = tile.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
