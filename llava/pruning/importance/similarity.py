"""Score tokens by cosine similarity: to the others of their row, or to an instruction."""

from torch import Tensor
from torch.nn.functional import normalize

from llava.pruning.importance.normalise import map_rows
from llava.pruning.precision import outside_autocast, widen


@outside_autocast()
def distinctiveness(
    z: Tensor, valid: Tensor | None = None, room: list[int] | None = None
) -> Tensor:
    """Return g_i = -mean_{j != i} cos(z_i, z_j) over the valid tokens of every row.

    Cen-Prune, arXiv 2608.30263; taken before any centring.

    Args:
        z: [B, N, C]; half precision is computed in float32.
        valid: BoolTensor [B, N]; invalid tokens do not count and get 0.
        room: valid tokens of every row, where known: see `map_rows`.

    Returns:
        [B, N] in [-1, 1], 0 in a row of one token. The cosines are summed at once,
        u_i . sum_j u_j with unit vectors u, so this takes N * C.
    """

    def of_row(own: Tensor) -> Tensor:
        unit = normalize(own, dim=-1)
        others = unit @ unit.sum(dim=0) - unit.square().sum(dim=-1)
        return -others / max(len(own) - 1, 1)

    return map_rows(of_row, z, valid, room)


@outside_autocast()
def text_relevance(image: Tensor, text: Tensor) -> Tensor:
    """Return the mean over a text's segments of cos(token, segment) (CDPruner, arXiv 2506.10967).

    Args:
        image: [N, E] tokens of one tile in the space that images and texts share.
        text: [m, E] embeddings of the m segments.

    Returns:
        [N] in float32 (float64 for float64). With CLIP, patches that show what the text mentions
        have the *lower* cosines.
    """
    tokens = normalize(widen(image), dim=-1)
    return (tokens @ normalize(text.to(tokens), dim=-1).T).mean(dim=-1)
