"""No pruning."""

from llava.pruning.method import PruningMethod, register


@register
class Unpruned(PruningMethod):
    """Keep everything: the unpruned model, bit for bit. The reference of every table."""

    name = "none"
    signal = "-"
    budgeted = False
    fidelity = "golden"

    def num_kept(self, n: int, budget: int) -> int:
        return n
