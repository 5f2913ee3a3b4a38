"""What Hugging Face's form of a LLaVA holds.

`<image>` becomes a token there. If the model has no embedding left for it, the tables of the
vocabulary get one more row, a copy of the unknown token's: the model puts the tokens of an image in
its place, and `suppress_tokens` keeps it out of answers.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer, LlavaNextProcessor, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from llava.conversation import conv_mode_for, conv_templates
from llava.model.checkpoint import hub_name
from llava.model.convert.chat_template import write_template
from llava.model.convert.source import EMBEDDINGS, VOCABULARY_TABLES, Source
from llava.model.convert.tokens import add_image_token, drop_call_settings
from llava.model.convert.weights import Weight
from llava.model.generation import read_generation_config
from llava.model.hugging_face import hugging_face_form

# Settings of the tower's image processor that LLaVA's of transformers have too.
_PIXELS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)


class ToHuggingFace:
    """The files of a checkpoint in Hugging Face's form.

    Args:
        source: in LLaVA's own form.
        name: of the model, which chooses its conversation template where the config does not.

    Raises:
        UserInputError: a model that transformers' classes would run differently.
    """

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.tokenizer, self.where = source, source.tokenizer, str(source.folder)
        source.config.mm_conv_mode = conv_mode_for(name, source.config)
        self.own_rows = len(source.weights[EMBEDDINGS].value)
        image_token = add_image_token(self.tokenizer, self.own_rows, self.where)
        self.rows = max(self.own_rows, image_token + 1)
        self.config = hugging_face_form(
            source.config,
            source.tower.config,
            source.tower.image_processor,
            self.where,
            rows=self.rows,
            image_token=image_token,
        )
        self.chat_template = self._chat_template()

    def weights(self) -> list[Weight]:
        """List the weights to write."""
        grows, filling = self.rows > self.own_rows, self.tokenizer.unk_token_id or 0
        weights = []
        for name, stored in self.source.weights.items():
            rows = self.rows if grows and name in VOCABULARY_TABLES else None
            weights.append(
                Weight(hub_name(name), stored.file, stored.key, stored.value, rows, filling)
            )
        return weights

    def write_settings(self, folder: Path) -> None:
        """Write all that is not weights."""
        self.config.save_pretrained(folder)
        answers = read_generation_config(self.source.folder, self.source.config)
        added = range(self.own_rows, self.rows)
        if added:
            answers.suppress_tokens = sorted({*(answers.suppress_tokens or ()), *added})
        answers.save_pretrained(folder)
        self._write_processor(folder)
        drop_call_settings(folder)

    def _chat_template(self) -> str:
        """Write the chat template, by the tokenizer as transformers will load it."""
        with TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            stock = AutoTokenizer.from_pretrained(folder)
        own = conv_templates[self.source.config.mm_conv_mode]
        return write_template(own, self.tokenizer, stock, self.where)

    def _write_processor(self, folder: Path) -> None:
        tiled = self.config.model_type == "llava_next"
        images = self._image_processor(tiled)
        processor = (LlavaNextProcessor if tiled else LlavaProcessor)(
            images,
            self.tokenizer,
            patch_size=self.config.vision_config.patch_size,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            num_additional_image_tokens=int(self.source.tower.has_class_token),
            chat_template=self.chat_template,
        )
        images.save_pretrained(folder)  # in a file of its own too, where older programs look
        processor.save_pretrained(folder)

    def _image_processor(self, tiled: bool) -> Any:
        """Make the processor whose pixels are those of `llava.anyres.process_images`."""
        own = self.source.tower.image_processor
        settings = {name: getattr(own, name) for name in _PIXELS}
        settings |= {name: dict(getattr(own, name)) for name in ("size", "crop_size")}
        if tiled:
            pinpoints = self.config.image_grid_pinpoints
            return LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=pinpoints)
        # Hugging Face's default is to cut the longer side off.
        return LlavaImageProcessorPil(**settings, do_pad=self.config.image_aspect_ratio == "pad")
