"""LLaVA-1.5's rule of what is learnt, by lengths of texts, written from its description alone.

The rendered text is split into rounds at the mark that ends an answer. A round's instruction goes
up to and with the mark that opens its answer. How many tokens a round and its instruction have is
known by tokenising each alone and correcting for what a text alone has more: BOS, and the space
after the opening mark. Where the lengths do not add up to that of the sample, nothing is learnt.

`python tests/train/label_rule.py` writes the goldens, `tests/goldens/train/labels.json`.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_tokenizer
from llava.train.conversations import render
from llava.train.samples import Sample

TESTS = Path(__file__).parents[1]
GOLDENS = TESTS / "goldens" / "train" / "labels.json"
TINY = TESTS.parent / "playground" / "llava-tiny"
TEMPLATES = (
    "v1",
    "llava_v1",
    "v1_mmtag",
    "llama_2",
    "llava_llama_2",
    "mistral_instruct",
    "mpt",
    "chatml_direct",
    "plain",
)
CHATML = ["<|im_start|>", "<|im_end|>"]


class Rule(NamedTuple):
    """How one style of templates is cut.

    Attributes:
        end: what ends an answer.
        opening: what opens one.
        extra: tokens that an instruction alone has more than in its round.
        shift: added to both lengths of rounds after the first, for what stands behind a special
            token.
    """

    end: str
    opening: str
    extra: int
    shift: int


def rule_of(template: Conversation, legacy: bool) -> Rule:
    speaker = template.roles[1]
    if template.sep_style is SeparatorStyle.TWO:
        assert template.sep2 is not None
        return Rule(template.sep2, f"{template.sep}{speaker}: ", 2, 0 if legacy else -1)
    if template.sep_style is SeparatorStyle.LLAMA_2:
        assert template.sep2 is not None
        return Rule(template.sep2, "[/INST] ", 2, 0)
    assert template.sep_style is SeparatorStyle.MPT
    return Rule(template.sep, f"{template.sep}{speaker}", 1, 1 if legacy else 0)


def rounds(prompt: str, template: Conversation, rule: Rule) -> Iterator[str]:
    pieces = prompt.split(rule.end)
    if template.sep_style is not SeparatorStyle.MPT:
        yield from pieces
        return
    # There the mark ends every message: the first round has three, with the system text.
    yield rule.end.join(pieces[:3])
    for start in range(3, len(pieces), 2):
        yield rule.end.join(pieces[start : start + 2])


def labels_by_rule(prompt: str, template: Conversation, tokenizer: Any) -> tuple[list[int], bool]:
    """Return labels of a prompt, and whether its lengths added up."""
    ids = tokenizer_image_token(prompt, tokenizer)
    if template.sep_style is SeparatorStyle.PLAIN:
        shown = len(tokenizer_image_token("<image>", tokenizer))
        return [IGNORE_INDEX] * shown + ids[shown:], True
    rule = rule_of(template, tokenizer.legacy)
    learnt = [False] * len(ids)
    place = 1  # BOS
    for number, text in enumerate(rounds(prompt, template, rule)):
        if text.count(rule.opening) != 1:
            break
        instruction = text[: text.index(rule.opening)] + rule.opening
        shift = rule.shift if number else 0
        length = len(tokenizer_image_token(text, tokenizer)) + shift
        masked = len(tokenizer_image_token(instruction, tokenizer)) - rule.extra + shift
        for index in range(place + masked, min(place + length, len(ids))):
            learnt[index] = True
        place += length
    if place != sum(index != tokenizer.pad_token_id for index in ids):
        return [IGNORE_INDEX] * len(ids), False
    return [i if kept else IGNORE_INDEX for i, kept in zip(ids, learnt, strict=True)], True


def vicuna_like(model: bytes) -> bytes:
    """Let a word at the start of a text have as many pieces more as in Vicuna's tokenizer.

    `▁US ER` is `USER` behind `</s>`, which the rule's -1 without `legacy` is for; `▁[` and `[` are
    one piece each, as Mistral's `[INST]` needs, for which the rule corrects nothing.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = {piece.piece: piece for piece in proto.pieces}
    for text in ("▁US", "▁USE", "▁USER"):
        if text in pieces:
            pieces[text].piece = f"<unused {text}>"
    best = max(piece.score for piece in proto.pieces if piece.type == 1)
    for text in ("US", "ER", "USER", "[", "▁["):
        if text not in pieces:
            pieces[text] = proto.pieces.add(piece=text)
        pieces[text].score = best + len(text)
    return proto.SerializeToString()


def make_tokenizer(model: bytes, legacy: bool, folder: Path, bos: bool = True) -> Any:
    """Load a tokenizer with ChatML's marks as tokens of their own."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model)
    settings = {"legacy": legacy, "add_bos_token": bos, "pad_token": "<unk>"}
    settings["tokenizer_class"] = "LlamaTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(CHATML, special_tokens=True)
    return tokenizer


def has_bos(key: str, legacy: bool) -> bool:
    """Whether the rule fits tokenizers that write BOS.

    For ChatML under `legacy` its +1 fits those that write none: there the mark that ends a round is
    not made up for by the BOS of the round alone. That is the tokenizer of LLaVA-1.6-34B.
    """
    return not (legacy and conv_templates[key].sep_style is SeparatorStyle.MPT)


def samples() -> list[Sample]:
    """What the goldens are of."""
    chats = [
        ("What color is the star?\n<image>", "red", "What does the blue sign say?", "8AH3"),
        ("Wie viele? 漢字 12.5%", "  naïve 🙂\n\nzwei ", "Why\tso?", "I do not know."),
        ("Is <image> like <image>?", "no", "<image>\nAnd this?", "yes", "Sure?", "1, 2, 3"),
        ("\n", " "),
    ]
    return [
        Sample(f"sample {number}", turns, ("a",) * "".join(turns).count("<image>"))
        for number, turns in enumerate(chats)
    ]


def write_goldens(file: Path) -> None:
    model = vicuna_like((TINY / "tokenizer.model").read_bytes())
    cases = []
    for legacy in (False, True):
        for key in TEMPLATES:
            template, bos = conv_templates[key], has_bos(key, legacy)
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = make_tokenizer(model, legacy, Path(folder) / "t", bos)
                for sample in samples():
                    if key == "plain":
                        sample = sample._replace(turns=("<image>", sample.turns[1]), images=("a",))
                    prompt = "".join(part.text for part in render(sample, template))
                    labels, fits = labels_by_rule(prompt, template, tokenizer)
                    assert fits, (key, legacy, sample)
                    ids = tokenizer_image_token(prompt, tokenizer)
                    learnt = [index for index, label in enumerate(labels) if label != IGNORE_INDEX]
                    asked = {"template": key, "legacy": legacy, "bos": bos, "turns": sample.turns}
                    cases.append({**asked, "ids": ids, "learnt": learnt})
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    write_goldens(GOLDENS)
