"""The timed greedy loop gives what `model.generate` gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llava.eval.generation import greedy_decode
from llava.eval.runner import Runner
from llava.eval.subject import Subject
from llava.mm_utils import process_images
from llava.model.llava_arch import padding_side
from llava.pruning import prune


@pytest.mark.parametrize("keep", [576, 48])
@pytest.mark.parametrize("early_end", [False, True])
def test_equals_generate(
    subject: Subject, make_runner: Callable[..., Runner], keep: int, early_end: bool
) -> None:
    runner = make_runner()
    items = [runner.plan.items[i] for i in (0, 3, 5, 8)]
    model = subject.model
    images = [runner.benchmark.load_image(item.images[0]) for item in items]
    pixels = process_images(images, subject.image_processor, model.config)
    ids, mask = runner.prompts(items, [1] * 4)
    ends = model.generation_config.eos_token_id
    with prune(model, "grid", keep_tokens=keep):
        expected = _generate(model, ids, mask, pixels, ends)
        if early_end:  # an end token that some rows really say, in the middle of their answer
            ends = int(expected[0, 3])
            expected = _generate(model, ids, mask, pixels, ends)
        with padding_side("left"), torch.inference_mode():
            visual = model.prune_visual_tokens(model.encode_visual_tokens(pixels))
            positions, merged, embeds, _ = model.splice_visual_tokens(
                visual, ids, torch.zeros_like(ids), mask
            )
    for given in (positions, None):
        decoded = greedy_decode(model, embeds, merged, given, end_tokens={ends}, max_new_tokens=8)
        assert decoded.tokens == [_until(row, ends) for row in expected.tolist()]
    assert decoded.prefill_ms > 0
    assert len({tuple(row) for row in decoded.tokens}) > 1, "the rows must differ to mean anything"


def test_a_single_token_has_no_later_step(
    subject: Subject, make_runner: Callable[..., Runner]
) -> None:
    runner = make_runner()
    ids, mask = runner.prompts(runner.plan.items[:2], [0, 0])
    with padding_side("left"), torch.inference_mode():
        _, merged, embeds, _ = subject.model.splice_visual_tokens(None, ids, None, mask)
    decoded = greedy_decode(subject.model, embeds, merged, end_tokens=(), max_new_tokens=1)
    assert [len(row) for row in decoded.tokens] == [1, 1]
    assert decoded.step_ms is None


def _generate(model, ids, mask, pixels, ends) -> torch.Tensor:
    return model.generate(
        inputs=ids,
        images=pixels,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=ends,
        pad_token_id=0,
    )


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row
