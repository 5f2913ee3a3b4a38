"""The text half of the CLIP model whose other half is the vision tower."""

from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPModel, CLIPTokenizer

from llava.model.checkpoint import read_json_object
from llava.model.multimodal_encoder.vision_tower import CONFIG_FILE, VisionTower, find_file
from llava.utils import UserInputError
from llava.value_rules import library_errors

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

# Kept next to the towers, not inside them: a saved model must not contain its text tower.
_loaded: "WeakKeyDictionary[VisionTower, CLIPTextTower]" = WeakKeyDictionary()
_complete: "WeakKeyDictionary[VisionTower, bool]" = WeakKeyDictionary()

# Threads that share a tower wait for one of them to load its text tower.
_lock = RLock()


class CLIPTextTower:
    """Embeds texts, and the vision tower's patches, in the space that CLIP trained for both.

    Args:
        model: the complete CLIP model; its vision tower is not kept.
        tokenizer: CLIP's.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any) -> None:
        self.text_model = model.text_model
        self.text_projection = model.text_projection
        self.visual_projection = model.visual_projection
        self.tokenizer = tokenizer
        text_config: Any = model.config.text_config
        self.segment_length = text_config.max_position_embeddings
        for module in (self.text_model, self.text_projection, self.visual_projection):
            module.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, text: str) -> torch.Tensor:
        """Embed the segments of a text: [m, E].

        A text of more ids than CLIP reads is cut into consecutive segments, wherever they end, as
        CDPruner does; only the first begins with CLIP's start token.
        """
        ids = torch.tensor(self.tokenizer(text, verbose=False)["input_ids"])
        segments = ids.to(self.text_projection.weight.device).split(self.segment_length)
        rows = pad_sequence(segments, batch_first=True)
        mask = pad_sequence([torch.ones_like(part) for part in segments], batch_first=True)
        return self.text_projection(self.text_model(rows, mask).pooler_output)

    @torch.no_grad()
    def embed_patches(self, tower: VisionTower, features: torch.Tensor) -> torch.Tensor:
        """Embed a tile's features [N, Dv] by the tower's last norm and CLIP's projection: [N, E].

        CLIP trained both for the class token; CDPruner puts the patches through them.
        """
        weight = self.visual_projection.weight
        return self.visual_projection(
            tower.vision_tower.post_layernorm(features.to(weight.device, weight.dtype))
        )


def has_text_tower(tower: VisionTower) -> bool:
    """Whether the folder or hub model that a tower is read from is a complete CLIP model."""
    with _lock:
        if tower not in _complete:
            config = find_file(tower.source, CONFIG_FILE)
            _complete[tower] = (
                config is not None
                and read_json_object(config).get("model_type") == "clip"
                and any(find_file(tower.source, name) for name in _TOKENIZER_FILES)
            )
        return _complete[tower]


def text_tower_of(tower: VisionTower) -> CLIPTextTower:
    """Return the text tower that belongs to a vision tower: loaded at the first call, then kept.

    Raises:
        UserInputError: it has none, or it cannot be loaded.
    """
    with _lock:
        known = _loaded.get(tower)
        if known is None or known.visual_projection.weight.device != tower.device:
            known = _loaded[tower] = _load(tower)
        return known


def _load(tower: VisionTower) -> CLIPTextTower:
    name = tower.vision_tower_name
    if not has_text_tower(tower):
        raise UserInputError(
            f"the vision tower {name!r} comes without a text tower: {tower.source!r} is not a "
            "complete CLIP model with its tokenizer. Set mm_vision_tower to one, or choose a "
            "setting that reads no question, such as cdpruner with relevance=none"
        )
    what = f"cannot load the text tower of {name!r} from {tower.source!r}"
    with library_errors(what, "download its files again"):
        loaded: Any = CLIPModel.from_pretrained(
            tower.source, dtype=tower.dtype, output_loading_info=True
        )
        model, info = loaded
        tokenizer = CLIPTokenizer.from_pretrained(tower.source)
    parts = ("text_model.", "text_projection.", "visual_projection.")
    missing = sorted(k for k in info["missing_keys"] if k.startswith(parts))
    if missing or model.visual_projection.in_features != tower.hidden_size:
        what = f"lacks {missing[0]!r}" if missing else "belongs to a tower of another width"
        raise UserInputError(
            f"the text tower in {tower.source!r} {what}; use the complete CLIP model that the "
            "vision tower was taken from"
        )
    model.vision_model = nn.Identity()  # the tower itself is there already
    return CLIPTextTower(model.to(tower.device), tokenizer)
