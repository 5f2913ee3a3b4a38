"""A random LLaVA with a real file layout, and a small benchmark whose answers are its own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from PIL import Image, ImageDraw
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.eval.engine.batches import Plan
from llava.eval.engine.request import UNPRUNED, Arm
from llava.eval.engine.runner import Runner
from llava.eval.tasks.question_file import QuestionFile
from llava.families.spec import ModelSpec
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.sampling import Sampling

WIDTH = 32
COLOURS = ("red", "green", "blue", "yellow", "white", "purple")


def build_checkpoint(folder: Path) -> Path:
    """Save a LLaVA of random weights (336 px, 576 patches, width 32) in native format."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    build_tokenizer(folder)
    tower = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
        initializer_factor=3.0,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    size = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=size).save_pretrained(
        folder / "tower"
    )
    config = LlavaConfig(
        vocab_size=sentencepiece.SentencePieceProcessor(
            str(folder / "tokenizer.model")
        ).vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # Large random weights make answers depend on image and question instead of noise.
        initializer_range=0.4,
        mm_vision_tower="tower",
        mm_hidden_size=WIDTH,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_patch_token=False,
        mm_conv_mode="vicuna_v1",
        image_aspect_ratio="pad",
        name_or_path=str(folder),
    )
    model = LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    model.save_pretrained(folder)
    return folder


def build_tokenizer(folder: Path) -> None:
    """Train a SentencePiece model with byte fallback on a few sentences."""
    text = [
        f"USER: What colour is the {shape}? ASSISTANT: It is {colour}."
        for shape in ("circle", "square", "number", "left", "right")
        for colour in COLOURS
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def build_benchmark(folder: Path, checkpoint: Path, images: int = 4, questions: int = 9) -> Path:
    """Draw pictures, ask about them, and call what the unpruned model says the right answer.

    So the unpruned model scores 100 %, and whatever changes an answer can be seen.
    """
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        draw_picture(number).save(folder / "images" / f"{number}.png")
    rows = [
        {
            "question_id": number,
            "image": f"{number % images}.png",
            "text": f"What colour is the {draw.choice(['circle', 'big square'])} {number}?",
            "category": ("color", "count")[number % 2],
        }
        for number in range(questions)
    ]
    write_lines(folder / "questions.jsonl", rows)
    write_lines(
        folder / "answers.jsonl",
        [{"question_id": row["question_id"], "answer": ""} for row in rows],
    )
    benchmark = QuestionFile(folder)
    sampling = Sampling(temperature=0, max_new_tokens=8)
    plan = Plan.of(benchmark.items(), 4)
    subject = ModelSpec(str(checkpoint), device="cpu").load()
    runner = Runner(subject, benchmark, plan, sampling=sampling, seed=0)
    said = {}
    for records, _ in runner.run([Arm(UNPRUNED)]):
        said |= {record["question_id"]: record["answer"] for record in records}
    write_lines(
        folder / "answers.jsonl",
        [{"question_id": int(key), "answer": answer} for key, answer in said.items()],
    )
    return folder


def draw_picture(seed: int) -> Image.Image:
    """Coloured rectangles, 336 x 336."""
    draw = random.Random(seed)
    picture = Image.new("RGB", (336, 336), draw.choice(COLOURS))
    pen = ImageDraw.Draw(picture)
    for _ in range(30):
        x, y, size = draw.randrange(300), draw.randrange(300), draw.randrange(10, 80)
        pen.rectangle((x, y, x + size, y + size), fill=draw.choice(COLOURS))
    return picture


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def exit_code(command: Callable[[], int]) -> int | str | None:
    """Run a command and return its exit code, whether the parser or the command itself ends it."""
    try:
        return command()
    except SystemExit as stop:
        return stop.code
