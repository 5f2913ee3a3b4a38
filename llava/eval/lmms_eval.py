r"""LLaVA with visual token pruning as a model of lmms-eval (0.7), found through its entry points.

    lmms_eval --model llava_pruned --tasks pope --batch_size 8 \
        --model_args pretrained=liuhaotian/llava-v1.5-7b,pruner=zoo,keep_tokens=64

Requests, prompts and decoding are those of lmms-eval's own `llava`, so figures can be held against
published ones. `--force_simple` asks with the task's text and pictures, without it with its chat
messages, which hold the same unless a task writes its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from llava.eval.engine.decode import end_tokens, until_end
from llava.eval.lmms_inputs import (
    Prompt,
    batch_size_of,
    device_of,
    dtype_of,
    pictures_of,
    read_messages,
)
from llava.eval.presets import get_preset
from llava.families.spec import ModelSpec
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.flags import make_pruning
from llava.sampling import Sampling, rows_depend
from llava.utils import UserInputError

LLAVA_TEMPLATE = "vicuna_v1"  # that of lmms-eval's own `llava`
OPTION_PREFIX = "pruner_"  # pruner_fusion=sum sets the option `fusion`
DECODER_PREFIX = "decoder_pruner_"  # decoder_pruner_k=3 sets the option `k` of decoder_pruner
# lmms-eval and its `llava` pass these; they have no effect here.
IGNORED = (
    *("max_batch_size", "device_map", "use_cache", "model_name"),
    *("truncation", "truncate_context", "tie_weights"),
)


class LlavaPruned(lmms):
    """The model under lmms-eval's "simple" interface: a text and the pictures of a document.

    Args:
        pretrained, model_base: as in `load_pretrained_model`.
        pruner, keep_tokens, keep_ratio, pruner_KEY: the pruning setting, `pruner=none` for the
            unpruned model; by default the one that the checkpoint was saved with, if any.
        decoder_pruner, decoder_keep_tokens, decoder_keep_ratio, decoder_pruner_KEY: what is dropped
            between layers of the language model, alone or behind `pruner`.
        preset: a named setting instead of `pruner` (`llava.eval.presets`).
        mm_next_protocol: how LLaVA-1.6 counts tokens; the preset's by default.
        conv_template: conversation template, by default vicuna_v1 for LLaVA checkpoints; others
            are asked in their own.
        dtype: float16, bfloat16 or float32; by default, and for auto, the loader's.
        device, batch_size: given by lmms-eval.

    Raises:
        UserInputError: an argument does not exist or cannot be used.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "liuhaotian/llava-v1.5-7b",
        model_base: str | None = None,
        pruner: str | None = None,
        keep_tokens: int | None = None,
        keep_ratio: float | None = None,
        decoder_pruner: str | None = None,
        decoder_keep_tokens: int | None = None,
        decoder_keep_ratio: float | None = None,
        preset: str | None = None,
        mm_next_protocol: str | None = None,
        conv_template: str | None = None,
        attn_implementation: str = "sdpa",
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        **others: Any,
    ) -> None:
        super().__init__()
        options, decoder_options = (
            {name.removeprefix(prefix): v for name, v in others.items() if name.startswith(prefix)}
            for prefix in (OPTION_PREFIX, DECODER_PREFIX)
        )
        prefixes = (OPTION_PREFIX, DECODER_PREFIX)
        unknown = [n for n in others if not n.startswith(prefixes) and n not in IGNORED]
        if unknown:
            raise UserInputError(f"llava_pruned takes no model_args {', '.join(unknown)}")
        self.batch_size = batch_size_of(batch_size)
        dtype = dtype_of(dtype)
        device = device_of(device)
        if preset is not None:
            if pruner is not None or options:
                raise UserInputError("preset= names method and options; leave pruner= out")
            chosen = get_preset(preset)
            pruner, options = chosen.method, dict(chosen.options)
            dtype = dtype or chosen.dtype
            mm_next_protocol = mm_next_protocol or chosen.mm_next_protocol
        if pruner is None and (options or keep_tokens is not None or keep_ratio is not None):
            raise UserInputError("keep_tokens=, keep_ratio= and options need pruner=METHOD")
        own = (decoder_keep_tokens, decoder_keep_ratio)
        decoder, pruning = None, None
        if decoder_pruner is not None:
            decoder = DecoderConfig(decoder_pruner, *own, options=decoder_options)
        elif decoder_options or own != (None, None):
            raise UserInputError(
                "decoder_keep_tokens=, decoder_keep_ratio= and options need decoder_pruner=METHOD"
            )
        if pruner is not None or decoder is not None:
            pruning = make_pruning(pruner, (keep_tokens, keep_ratio), options, decoder)
        accelerator = Accelerator()
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if self._world_size > 1:
            device = str(accelerator.device)
        spec = ModelSpec(pretrained, model_base, device, conv_template, dtype, mm_next_protocol)
        if conv_template is None:
            spec = spec.located().asked_in(LLAVA_TEMPLATE)
        self.loaded = spec.load(attn_implementation=attn_implementation)
        self.tokenizer, self.model = self.loaded.tokenizer, self.loaded.model
        self.loaded.pruning = self.loaded.own_pruning if pruning is None else pruning

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer `batch_size` requests at a time; return answers in the order of the requests."""
        answers: list[str] = []
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="answering")
        for start in range(0, len(requests), self.batch_size):
            batch = [
                self.prompt_of(request) for request in requests[start : start + self.batch_size]
            ]
            fresh = self.answer(batch)
            for request, answer in zip(requests[start:], fresh, strict=False):
                self.cache_hook.add_partial("generate_until", request.args[:3], answer)
            answers += fresh
            bar.update(len(fresh))
        bar.close()
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: tasks of this protocol generate."""
        raise NotImplementedError("llava_pruned generates answers; this task asks for likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse, as lmms-eval's `llava` does."""
        raise NotImplementedError("llava_pruned has no tasks of several rounds")

    def prompt_of(self, request: Instance) -> Prompt:
        """Read a request of (text, decoding, pictures of a document, its id, task, split)."""
        text, decoding, pictures, doc, task, split = request.args
        visuals = pictures(self.task_dict[task][split][doc])
        return Prompt(text, pictures_of(visuals, task), decoding)

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Answer prompts; those that decode alike and have images, or have none, together."""
        answers = [""] * len(prompts)
        for places in _groups(prompts):
            texts = self._generate([prompts[place] for place in places])
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
        return answers

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Prompt]) -> list[str]:
        config = self.model.generation_config
        output = self.loaded.answer(
            [self.loaded.row(prompt.dialogue) for prompt in prompts],
            [self.loaded.prepare(image) for prompt in prompts for image in prompt.images],
            [prompt.words for prompt in prompts],
            strict=rows_depend(config),
            **prompts[0].sampling.arguments_for(self.model, self.tokenizer),
        )
        ends, special = end_tokens(config), self.tokenizer.all_special_ids
        answers = [until_end(row, ends, special) for row in output.tolist()]
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)


class LlavaPrunedChat(LlavaPruned):
    """The same under lmms-eval's "chat" interface: messages, with pictures where they stand."""

    is_simple = False

    def prompt_of(self, request: Instance) -> Prompt:
        """Read a request of (text, messages of a document, decoding, its id, task, split).

        Raises:
            UserInputError: a message shows other media than pictures.
        """
        _, messages, decoding, doc, task, split = request.args
        return read_messages(messages(self.task_dict[task][split][doc]), decoding, task)


def manifests() -> ModelManifest:
    """Describe the models to lmms-eval; the entry point `lmms_eval.models` calls it."""
    return ModelManifest(
        "llava_pruned",
        simple_class_path=f"{__name__}.{LlavaPruned.__name__}",
        chat_class_path=f"{__name__}.{LlavaPrunedChat.__name__}",
    )


def _groups(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Yield places of prompts that one call of `generate` can answer."""
    groups: dict[tuple[bool, Sampling], list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault((bool(prompt.images), prompt.sampling), []).append(place)
    yield from groups.values()
