"""`llava bench`: what pruning costs and saves, stage by stage, on random weights of real widths."""
