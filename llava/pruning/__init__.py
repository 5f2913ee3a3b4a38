"""Visual token pruning: tensors and a projector in, indices out. Knows nothing of any model."""

from llava.pruning.active import attach, detach, prune
from llava.pruning.config import PruningConfig, parse_options
from llava.pruning.errors import PruningError
from llava.pruning.importance.sensitivity import sensitivity
from llava.pruning.importance.weight_cache import forget
from llava.pruning.ragged import RaggedTokens
from llava.pruning.registry import get_method, list_methods, register
from llava.pruning.selection.max_min import max_min
from llava.pruning.stage import importance_of, prune_visual_tokens, select
from llava.pruning.tokens import VisualTokens
from llava.pruning.trace import PruningTrace

__all__ = [
    "PruningConfig",
    "PruningError",
    "PruningTrace",
    "RaggedTokens",
    "VisualTokens",
    "attach",
    "detach",
    "forget",
    "get_method",
    "importance_of",
    "list_methods",
    "max_min",
    "parse_options",
    "prune",
    "prune_visual_tokens",
    "register",
    "select",
    "sensitivity",
]
