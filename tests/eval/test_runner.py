"""What each arm shows the model, and that batches do not change the outcome."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llava.eval.commands import quickstart
from llava.eval.commands.quickstart import plan_arms
from llava.eval.engine.batches import Plan, other_images
from llava.eval.engine.request import Arm, parse_arm
from llava.eval.engine.run import mark_unavailable
from llava.eval.engine.runner import Runner
from llava.eval.engine.schema import Record
from llava.eval.report.pictures import save_overlays
from llava.model import prompt_inputs as instruction
from llava.model.multimodal_encoder.readings import TowerReader
from llava.pruning import list_methods, register, registry
from llava.pruning.methods.fastervlm import FasterVLM
from llava.utils import UserInputError

PRUNED = ("random", "grid", "pool", "norm", "divprune", "zoo", "zoo-exact", "least-sensitive")


def plan(runner: Runner, methods: tuple[str, ...], budgets: list[int]) -> tuple[Arm, ...]:
    smaller = [budget for budget in budgets if budget < 576]
    return mark_unavailable(runner, plan_arms(methods, smaller))


def records_of(runner: Runner, arms: tuple[Arm, ...]) -> dict[tuple[str, str], Record]:
    return {
        (record["arm"], record["question_id"]): record
        for answers, _ in runner.run(arms)
        for record in answers
    }


def test_counts_come_from_the_spliced_input(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner()
    arms = plan(runner, ("none", "random", "pool", "zoo-exact"), [576, 96, 33])
    records = records_of(runner, arms)
    for arm in arms:
        seen = {record["tokens_in"] for (name, _), record in records.items() if name == arm.name}
        assert seen == {0 if arm.image == "absent" else arm.budget or 576}
    assert {arm.budget for arm in arms if arm.method == "random"} == {96, 33}


def test_controls_show_what_they_say(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner()
    records = records_of(runner, plan(runner, ("none",), [64]))
    for (arm, _), record in records.items():
        if arm == "shuffled-image":
            assert record["shown"] != record["images"] and record["tokens_in"] == 576
        elif arm == "no-image":
            assert record["shown"] == [] and record["tokens_in"] == 0
        else:
            assert record["shown"] == record["images"]
    changed = [
        records[arm, item.question_id]["answer"] != records["none", item.question_id]["answer"]
        for arm in ("shuffled-image", "no-image", "least-sensitive@64")
        for item in runner.plan.items
    ]
    assert sum(changed) > len(changed) / 2, "a control that changes nothing controls nothing"


def test_no_image_removes_the_mark(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner()
    (with_image,) = runner.prompts(runner.plan.items[:1], [1])
    (without,) = runner.prompts(runner.plan.items[:1], [0])
    assert (with_image == -200).sum() == 1
    assert (without == -200).sum() == 0
    assert "<image>" not in runner.subject.tokenizer.decode(without)


def test_an_impossible_budget_names_its_reason(make_runner: Callable[..., Runner]) -> None:
    arms = {arm.name: arm for arm in plan(make_runner(), ("none", "pool", "grid"), [576, 31])}
    assert "31" in arms["pool@31"].unavailable
    assert arms["grid@31"].unavailable is None
    assert arms["pool@31"].budget == 31


def test_one_image_has_no_other(make_runner: Callable[..., Runner]) -> None:
    assert other_images(["0.png"]) is None
    runner = make_runner()
    runner.plan = Plan.of(runner.plan.items[:1], 1)
    arms = quickstart.choose_arms(runner, plan_arms(["none"], []))
    assert {arm.name for arm in arms if arm.unavailable} == {"shuffled-image"}


def test_batch_size_does_not_matter(make_runner: Callable[..., Runner]) -> None:
    arms = plan(make_runner(), ("none", "random", "grid", "pool", "zoo-exact"), [64])
    alone, together = (records_of(make_runner(size), arms) for size in (1, 5))
    assert alone.keys() == together.keys()
    for (arm, _), record in alone.items():
        other = together[arm, record["question_id"]]
        assert record["tokens_in"] == other["tokens_in"]
        assert record["shown"] == other["shown"]
        if arm in ("none", "random@64", "grid@64", "pool@64"):
            assert record["kept"] == other["kept"]
    same = [record["answer"] == together[key]["answer"] for key, record in alone.items()]
    assert sum(same) >= 0.95 * len(same)


@pytest.mark.parametrize("method", PRUNED)
def test_kept_tokens_agree_alone_and_in_a_batch(
    make_runner: Callable[..., Runner], method: str
) -> None:
    runner = make_runner()
    arm = parse_arm(f"{method}@64")
    names = runner.plan.images()
    together = runner.prune_images(runner.encode(runner.source.load(names)), arm)
    for position, name in enumerate(names):
        alone = runner.prune_images(runner.encode(runner.source.load([name])), arm)
        if alone.kept is None:
            assert (alone.sources[0] == together.sources[position]).all()
            continue
        both = set(alone.kept[0].tolist()) & set(together.kept[position].tolist())
        assert len(both) >= 0.98 * 64


def test_arms_share_what_was_read_of_the_tower(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner()
    arms = plan(runner, ("none", "fastervlm", "visionzip"), [64])
    assert [arm.name for arm in arms if arm.unavailable] == []
    names = {record["arm"] for answers, _ in runner.run(arms) for record in answers}
    assert {"fastervlm@64", "visionzip@64"} <= names
    bare = runner.encode(runner.source.load(runner.plan.images()[:1]))
    assert set(bare.extras) == {"image_digest"}


def test_take_images_repeats_and_reorders(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner()
    visual = runner.encode(runner.source.load(runner.plan.images()))
    arm = parse_arm("random@9")
    taken = runner.prune_images(visual, arm).take_images([2, 0, 2])
    assert taken.image_index.tolist() == [0, 1, 2]
    assert (taken.kept[0] == taken.kept[2]).all() and (taken.kept[0] != taken.kept[1]).any()
    digests = visual.take_images([2, 0, 2]).extras["image_digest"]
    assert digests[0] == digests[2] == visual.extras["image_digest"][2]


def test_timings_cover_every_arm_and_batch(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner()
    arms = plan(runner, ("none", "zoo"), [64])
    lines = [line for _, timings in runner.run(arms) for line in timings]
    assert len(lines) == len(arms) * len(runner.plan.batches)
    assert [line["cold"] for line in lines if line["arm"] == "none"] == [True, False, False]
    for line in lines:
        assert line["prefill_ms"] > 0
        if line["arm"] == "zoo@64":
            assert line["prune_ms"] > 0 and line["score_ms"] > 0 and line["select_ms"] > 0
        if line["arm"] == "no-image":
            assert line["prune_ms"] is None


@pytest.mark.parametrize("method", ["mmtok", "cdpruner"])
def test_an_image_is_pruned_for_every_question_that_is_read(
    method, make_runner, monkeypatch, tmp_path
) -> None:
    """An image with several questions is pruned for each that is read, as if asked alone."""
    runner = make_runner(batch_size=4)
    model, seen = runner.subject.model, []
    own = model.prune_visual_tokens

    def watched(visual):
        seen.append(own(visual))
        return seen[-1]

    monkeypatch.setattr(model, "prune_visual_tokens", watched)
    arms = tuple(arm for arm in plan(runner, (method,), [24]) if arm.method == method)
    assert [arm.unavailable for arm in arms] == [None]
    seen.clear()
    save_overlays(runner, arms, 24, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").exists()
    label = runner.label(runner.encode(runner.source.load(runner.plan.images()[:1])), *arms)
    assert label == {"mmtok": "mmtok", "cdpruner": "cdpruner(relevance=none)"}[method]
    seen.clear()
    records = records_of(runner, arms)
    batches = runner.plan.batches
    if method == "mmtok":
        prunings = sum(map(len, batches))
    else:  # this model has no text tower, so the question is not read and images are shared
        prunings = sum(len({item.images for item in batch}) for batch in batches)
    assert sum(visual.num_images for visual in seen) == prunings
    alone = records_of(make_runner(batch_size=1), arms)
    assert {key: record["kept"] for key, record in records.items()} == {
        key: record["kept"] for key, record in alone.items()
    }
    if method == "mmtok":
        by_image: dict[tuple, set[str]] = {}
        for record in records.values():
            by_image.setdefault(tuple(record["images"]), set()).add(record["kept"])
        assert any(len(kept) > 1 for kept in by_image.values())


def test_a_question_is_read_where_the_model_can(make_runner, monkeypatch) -> None:
    runner = make_runner()
    asked = {"mmtok@1": True, "cdpruner@1": False, "cen-prune@1": False, "zoo@1": False}
    asked["none"] = False
    assert {name: runner.reads_question(parse_arm(name)) for name in asked} == asked
    monkeypatch.setattr(instruction, "has_text_tower", lambda tower: True)
    asked["cdpruner@1"] = True
    assert {name: runner.reads_question(parse_arm(name)) for name in asked} == asked


def test_a_method_that_needs_what_the_model_lacks_is_unavailable(make_runner, monkeypatch) -> None:
    """Its arms say why, and those of the other methods run."""

    class Blind(FasterVLM):
        name = "blind"
        needs = ("cls_attention", "depth_map")

        def score(self, tokens):
            tokens.extra("depth_map")

    runner = make_runner()
    own = TowerReader.extras

    def without_attention(self, tiles):
        if "cls_attention" in self.found:
            raise UserInputError("this tower has no class token")
        return own(self, tiles)

    list_methods()
    register(Blind)
    try:
        arms = _by_name(runner, ["none", "blind", "norm"])
        assert "depth_map" in arms["blind@64"].unavailable
        monkeypatch.setattr(TowerReader, "extras", without_attention)
        names = ["none", "blind", "fastervlm", "norm"]
        arms = _by_name(runner, names)
        for name in ("blind@64", "fastervlm@64"):
            assert arms[name].unavailable == "this tower has no class token"
        assert arms["norm@64"].unavailable is None
        seen = {record["arm"] for batch, _ in runner.run(arms.values()) for record in batch}
        assert seen == {"none", "norm@64", "least-sensitive@64", "shuffled-image", "no-image"}
    finally:
        del registry.METHODS._entries["blind"]


def _by_name(runner: Runner, methods: list[str]) -> dict[str, Arm]:
    return {arm.name: arm for arm in quickstart.choose_arms(runner, plan_arms(methods, [64]))}
