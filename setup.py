"""Packages two folders as one: `open_flamingo/` (the model) and `train/` (the program, as `open_flamingo.train`)."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


TRAINING = requirements("requirements-training.txt")
# moto and awscli: a real S3 endpoint on this machine, and the command that reads from it.
TEST = [
    "pytest>=8",
    "pytest-xdist",
    "moto[server]",
    "awscli",
    "setuptools>=64",
    "wheel",
    "hypothesis",
    "ruff==0.14.5",
    "mypy==1.18.2",
]

setup(
    name="open_flamingo",
    version="3.0.0",
    description="Train OpenFlamingo-style vision-language models: faster, exact on resume, safe to leave alone",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        "open_flamingo",
        "open_flamingo.train",
        "open_flamingo.train.checkpoint",
        "open_flamingo.train.data",
        "open_flamingo.scripts",
        "open_flamingo.scripts.convert",
        "open_flamingo.scripts.demo",
        "open_flamingo.scripts.evaluate",
        "open_flamingo.scripts.in_context",
    ],
    package_dir={
        "open_flamingo": "open_flamingo",
        "open_flamingo.train": "train",
        "open_flamingo.train.checkpoint": "train/checkpoint",
        "open_flamingo.train.data": "train/data",
        "open_flamingo.scripts": "scripts",
        "open_flamingo.scripts.convert": "scripts/convert",
        "open_flamingo.scripts.demo": "scripts/demo",
        "open_flamingo.scripts.evaluate": "scripts/evaluate",
        "open_flamingo.scripts.in_context": "scripts/in_context",
    },
    install_requires=requirements("requirements.txt"),
    extras_require={
        "training": TRAINING,
        "convert": [*TRAINING, "pyarrow"],  # for Parquet
        "evaluate": [*TRAINING, "pycocoevalcap"],  # the official scorers of captions
        "test": [*TRAINING, *TEST, "pyarrow", "pycocoevalcap"],
        "benchmark": [*TRAINING, "matplotlib"],
    },
    entry_points={
        "console_scripts": [
            "open-flamingo-train=open_flamingo.train.train:main",
            "open-flamingo-report=open_flamingo.train.page:main",
            "open-flamingo-caption=open_flamingo.scripts.caption:main",
            "open-flamingo-convert=open_flamingo.scripts.convert.__main__:main",
            "open-flamingo-evaluate=open_flamingo.scripts.evaluate.__main__:main",
            "open-flamingo-annotations=open_flamingo.scripts.evaluate.annotations:main",
            "open-flamingo-convert-mmc4=open_flamingo.scripts.convert_mmc4_to_wds:main",
        ]
    },
)
