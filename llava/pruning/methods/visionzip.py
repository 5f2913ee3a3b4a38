"""VisionZip."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.pruning.errors import PruningError
from llava.pruning.indices import true_places
from llava.pruning.method import Merged, PruningMethod, VisualTokens, option, register
from llava.pruning.selection.rows import top_k


@register
class VisionZip(PruningMethod):
    """Keep what the class token looks at, and merge the rest into a few contextual tokens.

    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
    arXiv 2412.04467. Of k tokens c are contextual, k - c dominant:

        dominant    the class token itself, then the k - c - 1 patches it attends to most
        targets     c of the remaining patches, every (n // c)-th of them
        assignment  each other patch to the target whose key is most similar (cosine)
        contextual  x_target + mean of the x assigned to it, then the projector

    c = floor(5 k / 32), as published: 54 + 10 of 64, 108 + 20 of 128, 162 + 30 of 192, 27 + 5 of
    32; below k = 7 there are none, and k = 1 is the class token alone.

    A tower without a class token (SigLIP): the k - c dominant tokens are patches, those with the
    most attention received, as in the released code; the trace says so.

    Options: contextual, c of every tile; ctx_merge `sum` (target plus mean, as the released code
    does) or `mean` (of the target and what was assigned to it, as the paper words it).

    LLaVA-1.6: k of every tile; base view first, then the crops' patches in the order of the canvas,
    their class tokens, their contextual tokens, and no newlines, all as in the released code. That
    code also keeps padding in play, on the checkpoint's own canvas: `mm_next_protocol="spatial"`
    with 5 k here; by default padding is out of reach. Where the released code differs: it compares
    keys in half precision.
    """

    name = "visionzip"
    signal = "class attention, key similarity"
    paper = "CVPR 2025, arXiv 2412.04467"
    needs = ("features", "projector", "cls_attention", "cls_feature", "encoder_keys")
    merges = True
    equivariant = False
    fidelity = "golden"

    contextual: int | None = option(None, at_least=0)
    ctx_merge: str = option("sum", choices=("sum", "mean"))

    def merge(self, tokens: VisualTokens, counts: Tensor) -> Merged:
        attention = torch.stack(tokens.extra("cls_attention"))
        few = torch.tensor([self._num_contextual(k) for k in counts.tolist()], dtype=torch.long)
        patches = counts - few - int(tokens.class_token)
        dominant = top_k(attention, patches, valid=tokens.valid).indices
        plan = zip(patches.tolist(), few.tolist(), tokens.tile_sizes(), strict=True)
        return Merged.stack(
            [
                self._merge_tile(tokens, tile, dominant[tile, :kept].sort().values, count, size)
                for tile, (kept, count, size) in enumerate(plan)
            ]
        )

    def _num_contextual(self, count: int) -> int:
        """Return the contextual tokens among `count`."""
        contextual = count * 5 // 32 if self.contextual is None else self.contextual
        if contextual >= count:
            raise PruningError(
                f"visionzip cannot make {contextual} contextual tokens and keep a dominant one in "
                f"a budget of {count} a tile; keep more, or set contextual={count - 1} or less"
            )
        return contextual

    def _merge_tile(
        self, tokens: VisualTokens, tile: int, dominant: Tensor, contextual: int, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return projected tokens [K, D], their sources [K, N] and places [K].

        Args:
            tokens: the batch.
            tile: which tile of it.
            dominant: its dominant patches, LongTensor, ascending.
            contextual: how many contextual tokens to make.
            size: how many of its patches are valid.
        """
        x, z = tokens.features[tile], tokens.projected[tile]
        patch = torch.arange(len(z), device=x.device)
        kept = dominant[:, None] == patch
        free = ~kept.any(dim=0) if tokens.valid is None else tokens.valid[tile] & ~kept.any(dim=0)
        # The class token, if there is one, comes first of all.
        lead = int(tokens.class_token)
        made = [tokens.extra("cls_feature")[tile].to(x)[None]] if lead else []
        sources = torch.zeros(lead + contextual, len(z), dtype=torch.bool, device=x.device)
        if contextual:
            rest = true_places(free, size - len(dominant))
            targets, others, owner = _clusters(tokens.extra("encoder_keys")[tile], rest, contextual)
            members = owner == torch.arange(contextual, device=x.device)[:, None]
            gathered = _sums(x[others], members)
            amount = members.sum(dim=1, keepdim=True)
            made.append(
                x[targets] + gathered / amount.clamp(min=1)
                if self.ctx_merge == "sum"
                else (x[targets] + gathered) / (1 + amount)
            )
            sources[lead:] = (targets[:, None] == patch).index_copy(1, others, members)
        new = tokens.projector(torch.cat(made)).to(z.dtype) if made else z[:0]
        place = torch.full((lead + contextual,), -2, device=x.device)
        place[:lead] = -1
        return (
            torch.cat([new[:lead], z[dominant], new[lead:]]),
            torch.cat([sources[:lead], kept, sources[lead:]]),
            torch.cat([place[:lead], dominant, place[lead:]]),
        )


@torch.no_grad()
def _clusters(keys: Tensor, rest: Tensor, contextual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the targets among `rest`, the other patches, and the target that each belongs to.

    Args:
        keys: [N, C].
        rest: LongTensor [r], the patches that are left, ascending.
        contextual: c, targets wanted.

    Returns:
        LongTensors [c], [r - c] and, from 0 to c - 1, [r - c].
    """
    step = max(1, len(rest) // contextual)
    last = torch.zeros_like(rest, dtype=torch.uint8)
    last[: step * contextual : step] = 1
    others, targets = rest[last.argsort(stable=True)].split([len(rest) - contextual, contextual])
    nearest = normalize(keys[others], dim=-1) @ normalize(keys[targets], dim=-1).T
    return targets, others, nearest.argmax(dim=1)


def _sums(x: Tensor, members: Tensor) -> Tensor:
    """Return the sum of x [r, C] over every cluster of BoolTensor members [c, r]: [c, C]."""
    if x.device.type == "cpu":
        return torch.stack([x[inside].sum(dim=0) for inside in members])
    # How many there are of each is not known on the host: a product of a fixed shape.
    return (members.float() @ x.float()).to(x.dtype)
