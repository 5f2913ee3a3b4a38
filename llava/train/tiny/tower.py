"""Train the vision tower of llava-tiny: `python -m llava.train.tiny.tower --output DIR`.

A small CLIP vision transformer learns to say what every patch shows, from its penultimate layer,
the one LLaVA reads. Its last block serves the CLS token alone, which learns what is in the image,
so that CLS attention means something to the pruning methods that use it. No loss compares tokens
with each other. A killed run continues from its last checkpoint and ends at the same weights: the
scenes of a step depend on its number only.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.command_line import OneLineParser, one_line_errors
from llava.train.tiny.patch_labels import CLASSES, IGNORE, NEIGHBOURS, patch_labels
from llava.world import scene
from llava.world.scene import PATCH
from llava.world.scene import ROWS as GRID

SIZES = {"tiny": (128, 4, 4), "small": (384, 9, 6)}  # width, layers, heads
_STEPS = tuple(NEIGHBOURS.values())
_WEIGHTS = {"pair": 0.5, "corner": 0.5, "quadrant": 0.5}
_MOSTLY_NOTHING = {"shape", "partner", *NEIGHBOURS}  # class 0 weighs less there


class SceneDataset(Dataset):
    """Draw training scenes `start .. stop` as (pixels, labels, pairs in the image)."""

    def __init__(self, start: int, stop: int, split: str = "train") -> None:
        self.start, self.stop, self.split = start, stop, split

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        made = scene(f"{self.split}/{self.start + index:06d}")
        labels = {k: torch.from_numpy(v).flatten() for k, v in patch_labels(made).items()}
        present = torch.zeros(CLASSES["pair"])
        present[labels["pair"][labels["pair"] != IGNORE]] = 1.0
        return torch.from_numpy(made.pixels).permute(2, 0, 1), labels, present


class DenseTower(nn.Module):
    """A CLIP tower with one linear head a label on its penultimate patch features."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.clip = CLIPVisionModel(config)
        width = config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in CLASSES.items()})
        self.whole = nn.Linear(width, CLASSES["pair"])
        processor = CLIPImageProcessorPil()
        for name in ("image_mean", "image_std"):
            values = torch.tensor(getattr(processor, name)).view(3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)
        self._start_local(width)

    @torch.no_grad()
    def _start_local(self, width: int) -> None:
        """Begin like a convolution: head h of every block looks one patch up, down, left or right.

        From CLIP's own start every patch attends to all 577 alike; after 2,100 steps the place of a
        character was known for 0.88 of the patches and the partner of an item not at all. With this
        start and the labels of neighbouring patches, added together, the former reached 1.00 in
        1,000 steps; the share of each was not measured. Positions start as 2-D sines and cosines in
        the first half of the channels and pixels in the second; queries equal keys turned by one
        patch, so the best match of a patch is its neighbour. Everything is trained from there.
        """
        quarter = width // 4
        rates = 1.5 * 30 ** -(torch.arange(quarter // 2) / (quarter // 2))
        angle = torch.arange(GRID)[:, None] * rates
        waves = torch.cat([angle.sin(), angle.cos()], dim=1)
        table = torch.zeros(GRID, GRID, width)
        table[..., :quarter] = waves[:, None]  # the same along a row
        table[..., quarter : 2 * quarter] = waves
        embeddings = self.clip.embeddings
        embeddings.position_embedding.weight[1:] = table.flatten(0, 1)
        embeddings.patch_embedding.weight.normal_(std=0.04)
        embeddings.patch_embedding.weight[: 2 * quarter] = 0
        for block in self.clip.encoder.layers:
            attention: Any = block.self_attn
            span = width // attention.num_heads
            for head in range(attention.num_heads):
                rows = slice(head * span, (head + 1) * span)
                query, key = _neighbour_match(rates, span, _STEPS[head % len(_STEPS)])
                for layer, start in ((attention.q_proj, query), (attention.k_proj, key)):
                    layer.weight[rows] = 0
                    layer.weight[rows, : 2 * quarter] = 2.8 * start

    def forward(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Turn uint8 `[B, 3, 336, 336]` into per-patch logits `[B, 576, C]` and image logits."""
        pixels = (pixels - self.image_mean) / self.image_std
        states = self.clip.pre_layrnorm(self.clip.embeddings(pixels))
        *blocks, last = self.clip.encoder.layers
        for block in blocks:
            states = block(states, attention_mask=None)
        features = self.norm(states[:, 1:])
        logits = {name: head(features) for name, head in self.heads.items()}
        return logits, self.whole(self.clip.post_layernorm(self._read_out(last, states)))

    @staticmethod
    def _read_out(block: Any, states: Tensor) -> Tensor:
        """Run the last block for the CLS token only `[B, D]`: its patch outputs are never read."""
        batch, _, width = states.shape
        attention = block.self_attn
        normed = block.layer_norm1(states)
        shape = (batch, -1, attention.num_heads, width // attention.num_heads)
        query = attention.q_proj(normed[:, :1]).view(shape).transpose(1, 2)
        key = attention.k_proj(normed).view(shape).transpose(1, 2)
        value = attention.v_proj(normed).view(shape).transpose(1, 2)
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        cls = states[:, 0] + attention.out_proj(read.reshape(batch, width))
        return cls + block.mlp(block.layer_norm2(cls))


def _neighbour_match(rates: Tensor, span: int, step: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Make query and key maps `[span, 4 F]` whose match is best `step` patches away.

    Channels are sin and cos at the `F` rates of the row, then of the column. A head reads
    `span / 4` of the rates; turning by `rate * step` moves a wave by `step` patches.
    """
    count = len(rates)
    chosen = torch.arange(span // 4) * count // (span // 4)
    query, key = torch.zeros(span, 4 * count), torch.zeros(span, 4 * count)
    for axis, distance in enumerate(step):
        for place, wave in enumerate(chosen.tolist()):
            sine, cosine = axis * 2 * count + wave, axis * 2 * count + count + wave
            turn = rates[wave] * distance
            row = (axis * len(chosen) + place) * 2
            key[row, sine] = key[row + 1, cosine] = 1.0
            query[row, sine], query[row, cosine] = turn.cos(), turn.sin()
            query[row + 1, cosine], query[row + 1, sine] = turn.cos(), -turn.sin()
    return query, key


def tower_loss(
    logits: dict[str, Tensor], whole: Tensor, labels: dict[str, Tensor], present: Tensor
) -> Tensor:
    """Add up per-patch cross entropies and the CLS token's multi-label loss."""
    total = F.binary_cross_entropy_with_logits(whole, present, pos_weight=whole.new_tensor(3.0))
    for name, scores in logits.items():
        weight = None
        if name in _MOSTLY_NOTHING:
            weight = scores.new_tensor([0.3] + [1.0] * (CLASSES[name] - 1))
        target = labels[name].flatten()
        part = F.cross_entropy(scores.flatten(0, 1), target, weight, ignore_index=IGNORE)
        total = total + _WEIGHTS.get(name, 1.0) * part
    return total


@torch.no_grad()
def measure_accuracy(model: DenseTower, scenes: int, device: str) -> dict[str, float]:
    """Measure the accuracy of every head over patches of validation scenes with a label."""
    model.eval()
    right, seen = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0)
    for pixels, labels, _ in DataLoader(SceneDataset(0, scenes, "val"), batch_size=16):
        logits, _ = model(pixels.to(device))
        for name, scores in logits.items():
            target = labels[name].to(device)
            applies = target > 0 if name in _MOSTLY_NOTHING else target != IGNORE
            right[name] += int((scores.argmax(-1) == target)[applies].sum())
            seen[name] += int(applies.sum())
    model.train()
    return {name: round(right[name] / seen[name], 4) for name in CLASSES}


def save_tower(
    model: DenseTower, args: argparse.Namespace, step: int, spent: float, scores: dict[str, float]
) -> None:
    """Write a CLIP vision folder that transformers and LLaVA load, and what it measured."""
    model.clip.save_pretrained(args.output)
    side = PATCH * GRID
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(args.output)
    record = {
        "step": step,
        "seconds": round(spent),
        "threads": torch.get_num_threads(),
        "patch_accuracy": scores,
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def build(args: argparse.Namespace) -> tuple[DenseTower, Optimizer, LambdaLR]:
    """Make the untrained tower, AdamW, and a cosine schedule with 100 steps of warm-up."""
    torch.manual_seed(args.seed)
    width, layers, heads = SIZES[args.size]
    config = CLIPVisionConfig(
        image_size=PATCH * GRID,
        patch_size=PATCH,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    model = DenseTower(config).to(args.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.02
    )

    def schedule(step: int) -> float:
        warm = min(1.0, (step + 1) / 100)
        return warm * max(0.01, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))

    return model, optimizer, LambdaLR(optimizer, schedule)


def train(args: argparse.Namespace) -> None:
    """Run to `args.steps`, from the checkpoint in `args.output` if there is one."""
    model, optimizer, scheduler = build(args)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    args.output.mkdir(parents=True, exist_ok=True)
    state_file = args.output / "checkpoint.pt"
    step, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, spent = state["step"], state["seconds"]
        print(f"resumed at step {step}")

    scenes = SceneDataset(step * args.batch_size, args.steps * args.batch_size)
    loader = DataLoader(scenes, batch_size=args.batch_size, num_workers=args.workers)
    bar = tqdm(loader, total=args.steps, initial=step, mininterval=10)
    since = time.monotonic()
    for pixels, labels, present in bar:
        logits, whole = model(pixels.to(args.device))
        labels = {name: value.to(args.device) for name, value in labels.items()}
        loss = tower_loss(logits, whole, labels, present.to(args.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        step += 1
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % args.save_every == 0 or step == args.steps:
            spent, since = spent + time.monotonic() - since, time.monotonic()
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"step": step, "seconds": spent}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            scores = measure_accuracy(model, args.val_scenes, args.device)
            tqdm.write(f"step {step} {spent:.0f}s {scores}")
            save_tower(model, args, step, spent, scores)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--val-scenes", type=int, default=48)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with one_line_errors(parser):
        train(args)


if __name__ == "__main__":
    main()
