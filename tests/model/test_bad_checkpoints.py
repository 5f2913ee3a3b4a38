"""Bad checkpoints: each gives one UserInputError that names the cause and the remedy."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.utils import UserInputError

Make = Callable[..., LlavaLlamaForCausalLM]
Damage = Callable[[Path], None]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm.weight"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def _remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _truncate(name: str, by: int = 100) -> Damage:
    def act(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:-by])

    return act


def _write(name: str, content: bytes | str) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def _in_turn(*acts: Damage) -> Damage:
    return lambda folder: [act(folder) for act in acts] and None


def _config(name: str = "config.json", **changes: object) -> Damage:
    def act(folder: Path) -> None:
        file = folder / name
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return act


def _weights(change: Callable[[dict[str, torch.Tensor]], object], name: str = WEIGHTS) -> Damage:
    def act(folder: Path) -> None:
        file = folder / name
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return act


def _lose(part: str, name: str = WEIGHTS) -> Damage:
    return _weights(lambda w: [w.pop(key) for key in list(w) if part in key], name)


def _shard(extra: str | None = None) -> Damage:
    """Turn the one file into a shard with an index, which may name a weight too many."""

    def act(folder: Path) -> None:
        names = [*load_file(folder / WEIGHTS), *([extra] if extra else [])]
        (folder / WEIGHTS).rename(folder / SHARD)
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SHARD)}))

    return act


def _as_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


class _Code:
    """Pickles to a call that leaves a file behind, so that a test can tell whether it ran."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


def _code_in(name: str, archive: bool = True) -> Damage:
    def act(folder: Path) -> None:
        content = {"lm_head.weight": _Code(folder / "the code ran")}
        if archive:
            torch.save(content, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))

    return act


def _qwen(folder: Path) -> None:
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))


_HF = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
COMPLETE: dict[str, tuple[Damage, str]] = {
    "no weights": (_remove(WEIGHTS), "has no weights"),
    "truncated": (_truncate(WEIGHTS), "model.safetensors' is damaged"),
    "cut in its header": (_truncate(WEIGHTS, by=40_000), "model.safetensors' is damaged"),
    "empty": (_write(WEIGHTS, b""), "model.safetensors' is damaged"),
    "text for weights": (_write(WEIGHTS, "<html>404</html>"), "model.safetensors' is damaged"),
    "pointer of git lfs": (
        _write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "model.safetensors' is damaged",
    ),
    "missing shard": (
        _in_turn(_shard(), _remove(SHARD)),
        f"names '{SHARD}', which is missing in",
    ),
    "truncated shard": (_in_turn(_shard(), _truncate(SHARD)), f"{SHARD}' is damaged"),
    "index with a weight too many": (
        _shard("model.layers.9.mlp.up_proj.weight"),
        "names 1 weights that are in no file, for example 'model.layers.9.mlp.up_proj.weight'",
    ),
    "index without a map": (
        _in_turn(_remove(WEIGHTS), _write(INDEX, "{}")),
        "index.json' is damaged",
    ),
    "index that leaves the folder": (
        _in_turn(_remove(WEIGHTS), _write(INDEX, '{"weight_map": {"a": "../a.safetensors"}}')),
        "weight_map does not name files next to it",
    ),
    "truncated bin": (
        _in_turn(_as_bin, _truncate("pytorch_model.bin")),
        "pytorch_model.bin' is damaged",
    ),
    "garbage bin": (
        _in_turn(_remove(WEIGHTS), _write("pytorch_model.bin", b"not a checkpoint")),
        "pytorch_model.bin' is",
    ),
    "code in bin": (
        _in_turn(_remove(WEIGHTS), _code_in("pytorch_model.bin")),
        "use a safetensors file or a .bin file that holds tensors only",
    ),
    "code in old bin": (
        _in_turn(_remove(WEIGHTS), _code_in("pytorch_model.bin", archive=False)),
        "use a safetensors file or a .bin file that holds tensors only",
    ),
    "no projector": (_lose("mm_projector.0"), "2 missing weights, for example 'model.mm_projector"),
    "no head": (_lose("lm_head"), "1 missing weights, for example 'lm_head.weight'"),
    "half a tower": (_lose("layers.1.mlp.fc1"), "2 missing weights, for example 'model.vision"),
    "weights too many": (
        _weights(lambda w: w.update(strange=torch.ones(2))),
        "1 unexpected weights, for example 'strange'",
    ),
    "more layers": (_config(num_hidden_layers=1), "9 unexpected weights"),
    "other projector": (_config(mm_projector_type="linear"), "missing weights"),
    "other vocabulary": (_config(vocab_size=70), "2 mismatched weights"),
    "misshapen weight": (
        _weights(lambda w: w.update({"model.norm.weight": torch.ones(31)})),
        "1 mismatched weights, for example 'model.norm.weight'",
    ),
    "NaN in the projector": (
        _weights(lambda w: w["model.mm_projector.2.bias"].fill_(float("nan"))),
        "'mm_projector.2.bias' of",
    ),
    "no config": (_remove("config.json"), "has no config.json"),
    "bad config": (_write("config.json", "{"), "config.json is damaged, it is not JSON"),
    "list for config": (_write("config.json", "[]"), "config.json' is not a JSON object"),
    "qwen": (_qwen, "holds Qwen2VLForConditionalGeneration (type 'qwen2_vl')"),
    "mpt": (
        _config(architectures=["LlavaMptForCausalLM"], model_type="llava_mpt"),
        "holds LlavaMptForCausalLM",
    ),
    "later tiles": (_config(image_aspect_ratio="anyres_max_9"), "is of a LLaVA after 1.6"),
    "later merging": (_config(mm_patch_merge_type="unpad_pool"), "is of a LLaVA after 1.6"),
    "no newline": (_config(mm_patch_merge_type="spatial_unpad"), "'model.image_newline'"),
    "converted without parts": (_config(**_HF, mm_vision_tower="absent"), "not LlavaLlama"),
    "language model": (
        _config(architectures=["LlamaForCausalLM"], model_type="llama", mm_vision_tower="absent"),
        "is a plain language model without a vision tower",
    ),
    "lost tower": (_config(mm_vision_tower="nowhere/at/all"), "cannot find the vision tower"),
    "unknown projector": (_config(mm_projector_type="cube"), "unknown mm_projector_type 'cube'"),
    "no tokenizer": (_write("tokenizer_config.json", "{}"), "but no tokenizer (tokenizer.model"),
    "bad tokenizer": (_write("tokenizer.model", b"no model"), "the tokenizer in"),
    "needless base": (lambda folder: None, "leave model_base out"),
}


@pytest.fixture
def saved(small_model: Make, tmp_path: Path) -> Path:
    """A whole model that carries its tower."""
    small_model(unfreeze_mm_vision_tower=True).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def _refusal(folder: Path, base: Path | None = None, **kwargs: object) -> str:
    with pytest.raises(UserInputError) as caught:
        load_pretrained_model(str(folder), base and str(base), device="cpu", **kwargs)
    text = str(caught.value)
    assert not list(folder.glob("the code ran")), "loading ran code of the file"
    assert "\n" not in text, "is more than a line"
    assert ";" in text or ". " in text, "says no remedy"
    return text


@pytest.mark.parametrize("damage", COMPLETE)
def test_complete_checkpoints(damage: str, saved: Path) -> None:
    act, message = COMPLETE[damage]
    act(saved)
    base = saved if damage == "needless base" else None
    assert message in _refusal(saved, base)


def _adapter(**changes: object) -> Damage:
    return _config("adapter_config.json", **changes)


def _adapter_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return _weights(change, "adapter_model.safetensors")


ADAPTERS: dict[str, tuple[Damage, str]] = {
    "no adapter weights": (_remove("adapter_model.safetensors"), "adapter_config.json but neither"),
    "truncated": (_truncate("adapter_model.safetensors"), "adapter_model.safetensors' is damaged"),
    "code": (
        _in_turn(_remove("adapter_model.safetensors"), _code_in("adapter_model.bin")),
        "adapter_model.bin' is not a plain weight file",
    ),
    "code beside it": (
        _code_in("non_lora_trainables.bin"),
        "non_lora_trainables.bin' is not a plain weight file",
    ),
    "nested bin": (
        lambda folder: torch.save({"a": {"b": 1}}, folder / "non_lora_trainables.bin"),
        "holds more than named tensors",
    ),
    "bad settings": (
        _write("adapter_config.json", "{"),
        "adapter_config.json is damaged, it",
    ),
    "settings without alpha": (_adapter(lora_alpha="absent"), "does not describe a LoRA"),
    "prefix tuning": (_adapter(peft_type="PREFIX_TUNING"), "peft_type='PREFIX_TUNING'"),
    "dora": (_adapter(use_dora=True), "more than a plain LoRA (use_dora=True)"),
    "pissa": (_adapter(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "bad pattern": (_adapter(alpha_pattern={"(": 1}), "alpha_pattern"),
    "half a pair": (_adapter_weights(lambda w: w.pop(B)), "only one of the two factors of"),
    "magnitudes": (
        _adapter_weights(lambda w: w.update({f"{Q}.lora_magnitude_vector": torch.ones(32)})),
        "is not part of a plain LoRA",
    ),
    "other width": (
        _adapter_weights(lambda w: w.update({A: torch.ones(4, 30)})),
        "has factors [4, 30] and [32, 4] for 'model.layers.0.self_attn.q_proj.weight' of shape",
    ),
    "two ranks": (_adapter_weights(lambda w: w.update({A: torch.ones(5, 32)})), "has factors [5"),
    "deeper model": (
        _adapter_weights(
            lambda w: w.update({k.replace(".0.", ".9."): torch.ones(4, 4) for k in (A, B)})
        ),
        "changes 'model.layers.9.self_attn.q_proj.weight', which is not a linear layer",
    ),
    "unknown weight": (
        _adapter_weights(lambda w: w.update({"base_model.model.model.odd": torch.ones(1)})),
        "holds 'model.odd', for which the model has no place",
    ),
    "misshapen projector": (
        lambda folder: torch.save(
            {f"base_model.model.{k}": v for k, v in _whole_projector(bias=31).items()},
            folder / "non_lora_trainables.bin",
        ),
        "holds 'model.mm_projector.0.bias' of shape [31], the model has [32]",
    ),
    "empty": (_adapter_weights(lambda w: w.clear()), "has no factors (lora_A, lora_B)"),
    "factors lost": (
        _adapter_weights(lambda w: (w.clear(), w.update({NORM: torch.ones(32)}))),
        "has no factors (lora_A, lora_B)",
    ),
    "only B": (_adapter_weights(lambda w: w.pop(A)), "only one of the two factors of"),
    "rank 0": (
        _adapter_weights(lambda w: w.update({A: torch.ones(0, 32), B: torch.ones(32, 0)})),
        "where a matrix with a rank of at least 1 belongs",
    ),
    "flat factor": (_adapter_weights(lambda w: w.update({A: torch.ones(128)})), "of shape [128]"),
    "whole numbers": (
        _adapter_weights(lambda w: w.update({A: torch.ones(4, 32, dtype=torch.int8)})),
        "of type int8",
    ),
    "factor twice": (
        _adapter_weights(lambda w: w.update({f"{Q}.lora_A.default.weight": torch.ones(4, 32)})),
        "twice, with and without the adapter's name",
    ),
    "a layer lost": (
        _adapter(target_modules=["q_proj"]),
        "lacks the factors of 1 layers that its target_modules name, for example "
        "'model.layers.1.self_attn.q_proj.weight'",
    ),
    "no module of this model": (
        _adapter_weights(
            lambda w: [w.update({k.replace("q_proj", "qkv"): w.pop(k)}) for k in (A, B)]
        ),
        "changes 'model.layers.0.self_attn.qkv.weight', which is not a linear layer",
    ),
    "inf in a factor": (
        _adapter_weights(lambda w: w[A].fill_(float("inf"))),
        "adapter_model.safetensors' holds NaN or inf",
    ),
    "alpha is NaN": (_adapter(lora_alpha=float("nan")), "lora_alpha=nan"),
    "alpha of a module is text": (_adapter(alpha_pattern={"q_proj": "8"}), "alpha_pattern"),
    "a part of the projector": (
        lambda folder: torch.save(
            {"base_model.model.model.mm_projector.0.bias": torch.ones(32)},
            folder / "non_lora_trainables.bin",
        ),
        "holds 1 of the 4 weights of the projector, 'model.mm_projector.0.weight' is missing",
    ),
    "no config": (_remove("config.json"), "has no config.json"),
    "qwen": (_qwen, "holds Qwen2VLForConditionalGeneration"),
    "no base": (lambda folder: None, "as model_base, which was 'lmsys/vicuna-7b-v1.5'"),
    "wrong base": (lambda folder: None, "is not a checkpoint folder"),
    "base of another kind": (lambda folder: None, "holds Qwen2VLForConditionalGeneration"),
    "base and weights": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / WEIGHTS),
        "holds a LoRA adapter and the weights of a whole model",
    ),
}


@pytest.fixture
def lora(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "config.json").write_text((saved / "config.json").read_text())
    config = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {A: torch.ones(4, 32), B: torch.ones(32, 4)},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def test_undamaged_folders_load(saved: Path, lora: Path) -> None:
    load_pretrained_model(str(saved), device="cpu")
    load_pretrained_model(str(lora), str(saved), device="cpu")


@pytest.mark.parametrize("damage", ADAPTERS)
def test_adapters(damage: str, lora: Path, saved: Path) -> None:
    act, message = ADAPTERS[damage]
    act(lora)
    base = {"no base": None, "base and weights": None, "wrong base": saved / "typo"}
    if damage == "base of another kind":
        _qwen(saved)
    assert message in _refusal(lora, base.get(damage, saved))


def test_an_adapter_of_chosen_layers_loads(saved: Path, lora: Path) -> None:
    """PEFT's rules by which fewer layers than all are trained."""
    for settings in (
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": r".*layers\.0\.self_attn\.q_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj"]},
    ):
        _adapter(**{"layers_to_transform": "absent", "exclude_modules": "absent", **settings})(lora)
        load_pretrained_model(str(lora), str(saved), device="cpu")


def _whole_projector(bias: int = 32) -> dict[str, torch.Tensor]:
    shapes = {"0.weight": (32, 16), "0.bias": (bias,), "2.weight": (32, 32), "2.bias": (32,)}
    return {f"model.mm_projector.{name}": torch.ones(shape) for name, shape in shapes.items()}


PROJECTORS: dict[str, tuple[Damage, str]] = {
    "no base": (lambda folder: None, "holds only a projector; give the language model"),
    "garbage": (_write("mm_projector.bin", b"x"), "mm_projector.bin' is"),
    "code": (_code_in("mm_projector.bin"), "mm_projector.bin' is not a plain weight file"),
    "half": (
        lambda folder: torch.save({"mm_projector.0.bias": torch.ones(32)}, _file(folder)),
        "3 missing weights, for example 'model.mm_projector.0.weight'",
    ),
    "something else": (
        lambda folder: torch.save({"model.norm.weight": torch.ones(3)}, _file(folder)),
        "holds 'model.norm.weight', which is not a weight of a projector",
    ),
    "a table alone": (
        lambda folder: torch.save({"lm_head.weight": torch.ones(3)}, _file(folder)),
        "holds 'lm_head.weight' and no weight of a projector",
    ),
    "other width": (
        lambda folder: torch.save(
            {**torch.load(_file(folder)), "mm_projector.2.bias": torch.ones(9)}, _file(folder)
        ),
        "holds 'model.mm_projector.2.bias' of shape [9], the model has [32]",
    ),
    "deeper": (
        lambda folder: torch.save(
            {**torch.load(_file(folder)), "mm_projector.4.bias": torch.ones(32)}, _file(folder)
        ),
        "holds 'model.mm_projector.4.bias', for which the model has no place",
    ),
    "NaN": (
        lambda folder: torch.save(
            {**torch.load(_file(folder)), "mm_projector.0.bias": torch.full((32,), float("nan"))},
            _file(folder),
        ),
        "mm_projector.bin' holds NaN or inf",
    ),
    "one weight twice": (
        lambda folder: torch.save(
            {**torch.load(_file(folder)), "model.mm_projector.0.bias": torch.ones(32)},
            _file(folder),
        ),
        "holds 'model.mm_projector.0.bias', a weight it has twice",
    ),
    "no config": (_remove("config.json"), "has no config.json"),
}


def _file(folder: Path) -> Path:
    return folder / "mm_projector.bin"


@pytest.mark.parametrize("damage", PROJECTORS)
def test_projectors(damage: str, saved: Path, tmp_path: Path) -> None:
    folder, base = tmp_path / "projector", tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text((saved / "config.json").read_text())
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    torch.save({f"mm_projector.{k}": torch.ones(v) for k, v in shapes.items()}, _file(folder))
    base.mkdir()
    _config(architectures=["LlamaForCausalLM"], model_type="llama", mm_vision_tower="absent")(saved)
    for name in ("config.json", WEIGHTS):
        (base / name).write_bytes((saved / name).read_bytes())
    _lose("mm_projector")(base)
    act, message = PROJECTORS[damage]
    act(folder)
    assert message in _refusal(folder, None if damage == "no base" else base)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_part_of_a_projector_over_a_whole_llava(kept: int, saved: Path, tmp_path: Path) -> None:
    """The rest would silently be the base's: half of one training, half of another."""
    folder = tmp_path / "projector"
    folder.mkdir()
    (folder / "config.json").write_text((saved / "config.json").read_text())
    weights = dict(list(_whole_projector().items())[:kept])
    if not kept:
        weights["model.embed_tokens.weight"] = torch.ones(64, 32)
    torch.save(weights, _file(folder))
    fault = f"holds {kept} of the 4 weights of the projector"
    if not kept:
        fault = "holds 'model.embed_tokens.weight' and no weight of a projector"
    assert fault in _refusal(folder, saved)


ARGUMENTS: dict[str, tuple[dict[str, object], str]] = {
    "both precisions": ({"load_8bit": True, "load_4bit": True}, "exclude each other"),
    "unknown attention": ({"attn_implementation": "fast"}, "unknown attn_implementation 'fast'"),
    "unknown device": ({"device": "abacus"}, "unknown device 'abacus'"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, saved: Path) -> None:
    arguments, message = ARGUMENTS[case]
    with pytest.raises(UserInputError) as caught:
        load_pretrained_model(str(saved), **{"device": "cpu", **arguments})
    assert message in str(caught.value) and ";" in str(caught.value)


def test_paths_and_pruning(saved: Path, tmp_path: Path) -> None:
    assert "is not a checkpoint folder" in _refusal(tmp_path / "typo")
    with pytest.raises(ValueError, match="sieve"):
        load_pretrained_model(
            str(saved), device="cpu", pruning={"method": "sieve", "keep_tokens": 2}
        )
