"""How the tiles of an image become one sequence of tokens, and what each token shows."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

NEWLINE = -1

# (left, top, right, bottom) in pixels of the original image; may reach beyond it.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ImageLayout:
    """Tiles of one image: the base view first, then the crops of a canvas, row by row.

    The canvas is the image fitted into (crop rows x crop columns) tiles and centred; around it is
    padding, which "unpad" cuts away. LLaVA-1.5 has only the base view.

    Attributes:
        grid: (rows, columns) of patches in a tile.
        crops: (rows, columns) of tiles that form the canvas; (0, 0) without crops.
        window: (top, left, rows, columns) of the patches of the canvas that are read, the others
            being padding; None for all.
        joined: canvas rows run across its tiles; False: one tile after the other.
        newline: a newline token ends every row of the window, or the base view if there are no
            crops.
        base_box, canvas_box: the part of the image that the base view and the canvas show; None
            where the image's size was not given.
        size: (width, height) of the image in pixels, where it was given.
    """

    grid: tuple[int, int]
    crops: tuple[int, int] = (0, 0)
    window: tuple[int, int, int, int] | None = None
    joined: bool = True
    newline: bool = False
    base_box: Box | None = None
    canvas_box: Box | None = None
    size: tuple[int, int] | None = None

    @property
    def tiles(self) -> int:
        """Base view and crops."""
        return 1 + self.crops[0] * self.crops[1]

    @property
    def patches(self) -> int:
        """Patches of one tile."""
        return self.grid[0] * self.grid[1]

    @property
    def sequence(self) -> Tensor:
        """LongTensor [n] on the CPU, not to be changed: what the unpruned model reads, in order.

        Entries are tile * patches + patch, or NEWLINE.
        """
        return self.sequence_on(torch.device("cpu"))

    def sequence_on(self, device: torch.device) -> Tensor:
        """Return `sequence` on a device, to which it is copied only once."""
        return _sequence(self.grid, self.crops, self.window, self.joined, self.newline, device)

    def places_on(self, device: torch.device) -> Tensor | None:
        """Return the place of every patch in `sequence`: LongTensor [tiles * patches].

        Padding gets 0. None where every patch has its own number as its place.
        """
        if self.crops == (0, 0):
            return None
        return _places(self.grid, self.crops, self.window, self.joined, self.newline, device)

    @cached_property
    def tile_sizes(self) -> tuple[int, ...]:
        """Patches of every tile that are not padding."""
        tokens = self.sequence[self.sequence != NEWLINE]
        return tuple(torch.bincount(tokens // self.patches, minlength=self.tiles).tolist())

    def newline_grid(self, ids: Tensor) -> Tensor:
        """View the part of `ids`, one per token of `sequence`, that newlines end: [rows, w + 1].

        The newline is the last of every row. [0, 1] for an image without newlines.
        """
        rows, width = self.newline_rows
        return ids[len(ids) - rows * (width + 1) :].view(rows, width + 1)

    @property
    def newline_rows(self) -> tuple[int, int]:
        """(rows, patches a row) of what newlines end; (0, 0) without newlines."""
        if not self.newline:
            return 0, 0
        if self.crops == (0, 0):
            return 1, self.patches
        return self._canvas if self.window is None else self.window[2:]

    @property
    def _canvas(self) -> tuple[int, int]:
        """(rows, columns) of patches of the canvas."""
        return self.crops[0] * self.grid[0], self.crops[1] * self.grid[1]

    def box(self, index: int) -> Box | None:
        """Return the part of the image that token `index` (tile * patches + patch) shows.

        None for a newline, and where the image's size was not given.
        """
        if index == NEWLINE:
            return None
        tile, patch = divmod(index, self.patches)
        row, col = divmod(patch, self.grid[1])
        box, shape = self.base_box, self.grid
        if tile > 0:
            down, across = divmod(tile - 1, self.crops[1])
            box, shape = self.canvas_box, self._canvas
            row, col = down * self.grid[0] + row, across * self.grid[1] + col
        return None if box is None else box_of_cell(box, shape, row, col)


def box_of_cell(box: Box, shape: tuple[int, int], row: int, col: int) -> Box:
    """Return cell (row, col) of `shape` equal cells over `box`."""
    left, top, right, bottom = box
    height, width = bottom - top, right - left
    return (
        left + col * width / shape[1],
        top + row * height / shape[0],
        left + (col + 1) * width / shape[1],
        top + (row + 1) * height / shape[0],
    )


@lru_cache(maxsize=256)
def _sequence(
    grid: tuple[int, int],
    crops: tuple[int, int],
    window: tuple[int, int, int, int] | None,
    joined: bool,
    newline: bool,
    device: torch.device,
) -> Tensor:
    if device.type != "cpu":
        own = _sequence(grid, crops, window, joined, newline, torch.device("cpu"))
        with torch.inference_mode(False):
            return own.to(device)
    with torch.inference_mode(False):
        patches = grid[0] * grid[1]
        base = torch.arange(patches)
        if crops == (0, 0):
            return torch.cat([base, torch.tensor([NEWLINE])]) if newline else base
        canvas = torch.arange(patches, patches * (1 + crops[0] * crops[1]))
        if not joined:
            return torch.cat([base, canvas])
        canvas = canvas.view(*crops, *grid).transpose(1, 2).flatten(2).flatten(0, 1)
        if window is not None:
            top, left, rows, cols = window
            canvas = canvas[top : top + rows, left : left + cols]
        if newline:
            canvas = torch.cat([canvas, canvas.new_full((len(canvas), 1), NEWLINE)], dim=1)
        return torch.cat([base, canvas.flatten()])


@lru_cache(maxsize=256)
def _places(
    grid: tuple[int, int],
    crops: tuple[int, int],
    window: tuple[int, int, int, int] | None,
    joined: bool,
    newline: bool,
    device: torch.device,
) -> Tensor:
    sequence = _sequence(grid, crops, window, joined, newline, torch.device("cpu"))
    with torch.inference_mode(False):
        places = torch.zeros(grid[0] * grid[1] * (1 + crops[0] * crops[1]), dtype=torch.long)
        at = (sequence != NEWLINE).nonzero()[:, 0]
        places[sequence[at]] = at
        return places.to(device)
