"""Random tokens."""

import hashlib

import torch
from torch import Tensor

from llava.pruning.method import PruningMethod, Rows, VisualTokens, option, register


@register
class Random(PruningMethod):
    """k of N valid tokens without replacement: the floor every method has to beat.

    The draw is a pure function of the seed, the tile's content, its place in the image and the
    image's place in its prompt, so batches, call order and other draws never change it. Content is
    `extras["image_digest"]` (a hash of the pixels) where the pipeline provides it, otherwise the
    bytes of the valid features. Report several seeds.
    """

    name = "random"
    signal = "chance"
    needs = ("image_digest",)
    equivariant = False

    seed: int = option(0, at_least=0, below=2**64)

    def pick(self, rows: Rows, row: int, count: int, tokens: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self._row_seed(rows.tokens, row, tokens))
        order = torch.randperm(len(tokens), generator=generator)[:count]
        if tokens.is_cuda:  # from ordinary memory a copy would wait
            order = order.pin_memory()
        return tokens[order.to(tokens.device, non_blocking=True)]

    def _row_seed(self, visual: VisualTokens, row: int, tokens: Tensor) -> int:
        image = int(visual.image_index[row])
        place = visual.tiles_of(image).index(row)
        positions = visual.extras.get("image_position")
        position = int(positions[image]) if positions is not None else 0
        digests = visual.extras.get("image_digest")
        if digests is not None:
            content = str(digests[row]).encode()
        else:
            source = visual.features if visual.features.shape[-1] else visual.projected
            content = source[row, tokens].detach().float().cpu().numpy().tobytes()
        key = f"{self.seed}/{place}/{position}/".encode() + content
        return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
