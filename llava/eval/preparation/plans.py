"""Where the data of each benchmark come from, and how many questions must arrive.

Dataset ids are those that lmms-eval published (its newer releases read copies that need a login);
`--dataset` names another. Counts are published ones; a benchmark whose count we know from no
publication has None, and is not held to one. No hashes are known here.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava.eval.data.hub import Dataset
from llava.eval.preparation import builders
from llava.eval.preparation.builders import Build

ARCHIVE = "LLaVA's evaluation archive eval.zip"


@dataclass(frozen=True)
class Plan:
    """How one benchmark under one protocol gets its data.

    Attributes:
        count: prompts that it must have.
        with_image: how many of them have an image, where not all do.
        files: files below the data root that `--from` may hold as they are published.
        tree: a folder below the data root of which `--from` may hold everything.
        images: folder of images below the data root; None where a file holds them.
        originals: what to download for `--from`.
        datasets, build: public datasets and what makes the files of them; none where the datasets
            lack something that the files need.
        images_only: the datasets give images and nothing else.
    """

    count: int | None
    files: tuple[str, ...]
    images: str | None
    originals: str
    datasets: tuple[Dataset, ...] = ()
    build: Build | None = None
    with_image: int | None = None
    tree: str | None = None
    images_only: bool = False


def _lmms(name: str, columns: str, split: str = "test", config: str | None = None) -> Dataset:
    return Dataset(f"lmms-lab/{name}", config, split, tuple(columns.split()))


_MMBENCH = "index question hint A B C D answer image"
_VQA = "question_id image_id question image"

PLANS: dict[str, dict[str, Plan]] = {
    "gqa": {
        "llava": Plan(
            count=12_578,
            files=(
                "gqa/llava_gqa_testdev_balanced.jsonl",
                "gqa/data/testdev_balanced_questions.json",
            ),
            images="gqa/data/images",
            originals=f"{ARCHIVE}, and GQA's questions1.2.zip and images.zip",
            datasets=(
                _lmms("GQA", "id image", "testdev", "testdev_balanced_images"),
                _lmms(
                    "GQA",
                    "id imageId question answer isBalanced types",
                    "testdev",
                    "testdev_balanced_instructions",
                ),
            ),
            build=builders.gqa,
        )
    },
    "vqav2": {
        "val": Plan(
            count=214_354,
            files=(
                "vqav2/v2_mscoco_val2014_annotations.json",
                "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
            ),
            images="vqav2/val2014",
            originals="VQA v2's questions and annotations of val, and COCO's val2014.zip",
            datasets=(_lmms("VQAv2", f"{_VQA} answers question_type answer_type", "validation"),),
            build=builders.vqav2_val,
        ),
        "test-dev": Plan(
            count=107_394,
            files=(
                "vqav2/llava_vqav2_mscoco_test2015.jsonl",
                "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
            ),
            images="vqav2/test2015",
            originals=f"{ARCHIVE}, and COCO's test2015.zip",
            datasets=(_lmms("VQAv2", _VQA), _lmms("VQAv2", _VQA, "testdev")),
            build=builders.vqav2_test,
        ),
    },
    "textvqa": {
        protocol: Plan(
            count=5_000,
            files=(
                "textvqa/TextVQA_0.5.1_val.json",
                "textvqa/llava_textvqa_val_v051_ocr.jsonl",
            ),
            images="textvqa/train_images",
            originals=f"{ARCHIVE}, and TextVQA's TextVQA_0.5.1_val.json and train_val_images.zip",
            datasets=(
                _lmms(
                    "textvqa",
                    "image_id question_id question answers ocr_tokens image",
                    "validation",
                ),
            ),
            build=builders.textvqa,
        )
        for protocol in ("ocr", "no-ocr")
    },
    "pope": {
        "llava": Plan(
            count=8_910,
            files=(
                "pope/llava_pope_test.jsonl",
                *(
                    f"pope/coco/coco_pope_{kind}.json"
                    for kind in ("random", "popular", "adversarial")
                ),
            ),
            images="pope/val2014",
            originals=f"{ARCHIVE}, POPE's output/coco (the revision whose random file has 2,910 "
            "lines), and COCO's val2014.zip",
            datasets=(_lmms("POPE", "image_source image"),),
            build=builders.pope,
            images_only=True,
        )
    },
    "mme": {
        "llava": Plan(
            count=2_374,
            files=("MME/llava_mme.jsonl",),
            tree="MME/MME_Benchmark_release_version",
            images="MME/MME_Benchmark_release_version",
            originals=f"{ARCHIVE}, and MME_Benchmark_release_version.zip",
            datasets=(_lmms("MME", "question_id question answer category image"),),
            build=builders.mme,
        )
    },
    "scienceqa": {
        "llava": Plan(
            count=4_241,
            with_image=2_017,
            files=(
                "scienceqa/problems.json",
                "scienceqa/pid_splits.json",
                "scienceqa/llava_test_CQM-A.json",
            ),
            images="scienceqa/images/test",
            originals=f"{ARCHIVE}, and ScienceQA's problems.json, pid_splits.json and test.zip "
            "(public datasets leave out the ids of the problems)",
        )
    },
    "mmbench": {
        protocol: Plan(
            count=None,
            files=("mmbench/mmbench_dev_20230712.tsv",),
            images=None,
            originals="MMBench's mmbench_dev_20230712.tsv",
            datasets=(_lmms("MMBench", _MMBENCH, "dev", "en"),),
            build=builders.mmbench("mmbench/mmbench_dev_20230712.tsv"),
        )
        for protocol in ("single", "circular")
    },
    "mmbench-cn": {
        protocol: Plan(
            count=None,
            files=("mmbench_cn/mmbench_dev_cn_20231003.tsv",),
            images=None,
            originals="MMBench's mmbench_dev_cn_20231003.tsv",
            datasets=(_lmms("MMBench", _MMBENCH, "dev", "cn"),),
            build=builders.mmbench("mmbench_cn/mmbench_dev_cn_20231003.tsv"),
        )
        for protocol in ("single", "circular")
    },
    "seed": {
        protocol: Plan(
            count=count,
            files=("seed_bench/SEED-Bench.json", "seed_bench/llava-seed-bench.jsonl"),
            images="seed_bench",
            originals=f"{ARCHIVE}, SEED-Bench.json, its image archive, and for `all` the middle "
            "frames of its videos",
            datasets=(
                _lmms(
                    "SEED-Bench",
                    "question_id question_type_id data_type data_id question answer choice_a "
                    "choice_b choice_c choice_d image",
                ),
            ),
            build=builders.seed,
        )
        for protocol, count in (("image", 14_233), ("all", None))
    },
    "mmmu": {
        "llava": Plan(
            count=900,
            files=("mmmu/validation.jsonl",),
            images="mmmu/images",
            originals="a folder mmmu/ that was prepared elsewhere",
            datasets=(
                _lmms(
                    "MMMU",
                    "id question options answer question_type "
                    + " ".join(f"image_{number}" for number in range(1, 8)),
                    "validation",
                ),
            ),
            build=builders.mmmu,
        )
    },
    "vizwiz": {
        "llava": Plan(
            count=8_000,
            files=("vizwiz/llava_test.jsonl",),
            images="vizwiz/test",
            originals=f"{ARCHIVE}, and VizWiz's test.zip",
            datasets=(_lmms("VizWiz-VQA", "question_id question image"),),
            build=builders.vizwiz,
        )
    },
    "mmvet": {
        "llava": Plan(
            count=218,
            files=("mm-vet/llava-mm-vet.jsonl",),
            images="mm-vet/images",
            originals=f"{ARCHIVE}, and mm-vet.zip",
            datasets=(_lmms("MMVet", "question_id question image"),),
            build=builders.mmvet,
        )
    },
    "llava-bench": {
        "llava": Plan(
            count=60,
            files=("llava-bench-in-the-wild/questions.jsonl",),
            images="llava-bench-in-the-wild/images",
            originals="the folder llava-bench-in-the-wild",
            datasets=(
                _lmms(
                    "llava-bench-in-the-wild",
                    "question_id question category image_id image",
                    "train",
                ),
            ),
            build=builders.llava_bench,
        )
    },
}
