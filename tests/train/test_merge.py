"""Text and images merge inside the forward pass, whatever wraps the model; nothing stays behind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_llava import make_item, make_llava, save_tower
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llava.constants import IGNORE_INDEX
from llava.model.builder import load_tokenizer
from llava.train import merge as merge_module
from llava.train.data import Collator
from llava.train.merge import merge, merging
from llava.utils import UserInputError

TEXTS = ("What color?", "red", "How many stars?", "two", "Where is it?", "upper left")
WIDE, SMALL = (64, 32), (40, 40)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    save_tower(folder)
    return folder


@pytest.fixture
def model(tokenizer: Any, tower: Path) -> Any:
    return make_llava(tokenizer, tower, torch.float64)


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> Any:
    return load_tokenizer(work / "init")


def collate(model: Any, tokenizer: Any, *items: dict[str, Any]) -> dict[str, Any]:
    """A batch of the items, its pixels in the model's precision."""
    batch = Collator(tokenizer.pad_token_id, 4096)(list(items))
    images = batch.get("images")
    if isinstance(images, list):
        batch["images"] = [image.to(model.dtype) for image in images]
    elif images is not None:
        batch["images"] = images.to(model.dtype)
    return batch


@pytest.fixture
def shown(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Rows with two images, one and none."""
    items = [
        make_item(model, tokenizer, TEXTS, WIDE, SMALL),
        make_item(model, tokenizer, TEXTS[:2], WIDE),
        make_item(model, tokenizer, TEXTS[2:4]),
    ]
    return collate(model, tokenizer, *items)


@pytest.fixture
def text_only(model: Any, tokenizer: Any) -> dict[str, Any]:
    items = [make_item(model, tokenizer, texts) for texts in (TEXTS[:2], TEXTS)]
    return collate(model, tokenizer, *items)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all gradients, which are then forgotten."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=atol), name


@pytest.mark.parametrize("kind", ["shown", "text_only"])
def test_a_call_takes_a_batch(kind: str, model: Any, request: pytest.FixtureRequest) -> None:
    batch = request.getfixturevalue(kind)
    wanted = model(**merge(model, batch))
    with merging(model):
        assert torch.equal(model(**batch).loss, wanted.loss)
        learnt = torch.tensor(int((batch["labels"] != IGNORE_INDEX).sum()))
        summed = model(**batch, num_items_in_batch=learnt * 2).loss
        assert torch.isclose(summed * 2, wanted.loss)
        assert isinstance(model(**batch, return_dict=False), tuple)


def test_text_is_what_it_is_as_ids(model: Any, text_only: dict[str, Any]) -> None:
    known = {key: text_only[key] for key in ("input_ids", "labels")}
    with merging(model):
        assert torch.allclose(model(**text_only).loss, model(**known).loss, atol=1e-12)


def test_other_calls_pass_untouched(model: Any, shown: dict[str, Any]) -> None:
    keys = ("input_ids", "attention_mask", "images", "image_sizes")
    plain = {key: shown[key] for key in keys}
    before = model(**plain).logits, model.generate(**plain, max_new_tokens=4, do_sample=False)
    with merging(model):
        after = model(**plain).logits, model.generate(**plain, max_new_tokens=4, do_sample=False)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_nothing_stays_behind(model: Any, shown: dict[str, Any]) -> None:
    state = set(vars(model))
    with merging(model):
        model(**shown)
    with pytest.raises(ZeroDivisionError), merging(model):
        raise ZeroDivisionError
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    assert set(vars(model)) == state and "forward" not in vars(model)


def test_what_holds_no_llava_is_refused() -> None:
    with pytest.raises(UserInputError, match="Linear is not a LLaVA"), merging(nn.Linear(1, 1)):
        pass


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_sees_the_projectors_work(model: Any, shown: dict[str, Any], one_process: None) -> None:
    merged = merge(model, shown)
    model(**merged).loss.backward()
    wanted = gradients(model)
    assert any("mm_projector" in name for name in wanted)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    with merging(wrapped):
        wrapped(**shown).loss.backward()
    assert_alike(gradients(model), wanted, 1e-12)


@pytest.mark.parametrize("kind", ["shown", "text_only"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not re-entrant", "re-entrant"])
def test_checkpoints_give_the_same_gradients(
    reentrant: bool, lora: bool, kind: str, model: Any, request: pytest.FixtureRequest
) -> None:
    batch = request.getfixturevalue(kind)
    trained: nn.Module = model
    if lora:
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        names = [n for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]
        config = peft.LoraConfig(
            target_modules=[f"model.layers.{name}" for name in names],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        trained = peft.get_peft_model(model, config)
        model.get_model().mm_projector.requires_grad_(True)
    trained.train()
    with merging(trained):
        trained(**batch).loss.backward()
        wanted = gradients(trained)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        trained(**batch).loss.backward()
    assert_alike(gradients(trained), wanted, 1e-12)
    assert any("mm_projector" in name for name in wanted)
    assert any("lora_A" in name for name in wanted) == lora


@pytest.mark.parametrize("summed", [True, False])
def test_samples_without_an_answer_left(
    summed: bool,
    model: Any,
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = [
        make_item(model, tokenizer, TEXTS[:2], WIDE, name="sample 'good'"),
        make_item(model, tokenizer, ("red " * 60, "two"), name="sample 'long'"),
    ]
    model.config.tokenizer_model_max_length = limit = 80
    batch, alone = collate(model, tokenizer, *items), collate(model, tokenizer, items[1])
    count = {"num_items_in_batch": torch.tensor(7)} if summed else {}
    fault = rf"sample 'long'.*first answer begins behind the length limit of {limit} tokens"
    with merging(model), pytest.raises(UserInputError, match=f"^{fault}.*--model_max_length"):
        model(**batch, **count)
    with merging(model, skipping=True):
        good = model(**collate(model, tokenizer, items[0]), **count).loss
        assert torch.allclose(model(**batch, **count).loss, good)
        if summed:
            assert model(**alone, **count).loss == 0
        else:
            with pytest.raises(UserInputError, match=fault):
                model(**alone)
    assert "sample 'long' adds nothing to the loss" in caplog.text
    assert "good" not in caplog.text


def test_a_batch_of_text_touches_the_vision_side(
    model: Any, text_only: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tower is frozen, only the projector and the newline get zeros for gradients."""
    with merging(model):
        with monkeypatch.context() as patch:
            patch.setattr(merge_module, "_touch_vision", lambda *_: [])
            loss = model(**text_only).loss
        loss.backward()
        wanted = gradients(model)
        touched = model(**text_only).loss
        assert torch.equal(touched, loss)
        touched.backward()
    found = gradients(model)
    added = {name: found.pop(name) for name in found.keys() - wanted.keys()}
    assert_alike(found, wanted, 0)
    trained = {n for n, p in model.get_model().mm_projector.named_parameters() if p.requires_grad}
    assert added.keys() == {
        "model.image_newline",
        *(f"model.mm_projector.{name}" for name in trained),
    }
    assert all((gradient == 0).all() for gradient in added.values())


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_of_text_takes_the_way_of_images_under_zero_3(
    cached: bool, model: Any, text_only: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or processes would wait for one another; what is computed stays the same."""
    with merging(model):
        wanted = model(**text_only).loss
    projected = []
    run = model.get_model().mm_projector.register_forward_hook(
        lambda module, args, output: projected.append(output.shape)
    )
    monkeypatch.setattr(merge_module, "is_deepspeed_zero3_enabled", lambda: True)
    with merging(model, cached=cached):
        loss = model(**text_only).loss
    run.remove()
    assert len(projected) == 1 and projected[0][0] == len(text_only["input_ids"])
    assert torch.equal(loss, wanted)
    loss.backward()
    gradient = model.get_model().mm_projector[0].weight.grad
    assert gradient is not None and (gradient == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_with_images_only_takes_hold_of_the_newline(
    frozen: bool, model: Any, shown: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(model, "encode_images", lambda images: calls.append(images))
    model.get_model().image_newline.requires_grad_(not frozen)
    zeros = merge_module._touch_vision(model, True, False)
    assert not calls and len(zeros) == int(not frozen)
    with torch.no_grad():
        assert not merge_module._touch_vision(model, False, False)


def test_cached_features_touch_the_projector_alone(
    model: Any, text_only: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.get_vision_tower(), "forward", None)
    with merging(model, cached=True):
        model(**text_only).loss.backward()
    gradient = model.get_model().mm_projector[0].weight.grad
    assert gradient is not None and (gradient == 0).all()
