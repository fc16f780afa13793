"""open-flamingo-evaluate end to end on a tiny model: prompts, demonstrations, scores, ranks, kills, annotation files."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from open_flamingo import create_model_and_transforms, load
from open_flamingo.scripts.evaluate.__main__ import main
from open_flamingo.scripts.evaluate.annotations import main as annotations
from open_flamingo.scripts.evaluate.conditions import Condition, PromptBuilder, batches, conditions
from open_flamingo.scripts.evaluate.data import Record, random_demonstrations, read_records, shuffled_answers
from open_flamingo.scripts.evaluate.images import Images, Latents, read_image
from open_flamingo.scripts.evaluate.likelihood import TOLERANCE, ClassNames, can_use_cache, class_log_likelihoods
from open_flamingo.scripts.evaluate.metrics import CaptionScorer, normalize_answer, roc_auc, simple_tokens, vqa_accuracy
from open_flamingo.scripts.evaluate.prompts import HATEFUL_MEMES, PROMPTS, Prompt, answer_of, default_prompt
from open_flamingo.scripts.evaluate.rices import most_similar
from open_flamingo.weights import trained_tensors
from tests.conftest import only_at_length
from tests.families import FAMILIES, IMAGE, PAD, flamingo, images, language_model
from tests.ranks import run_ranks
from tests.tiny import ROOT, finished, kill, torchrun

COLORS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200), "gray": (120, 120, 120)}
TEST, CONTEXT = 13, 9  # records
PROGRAM = ("-m", "open_flamingo.scripts.evaluate")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java: apt-get install default-jre-headless")


# ---------------------------------------------------------------------------------------------------------------------
# Data and a model


def write_data(folder: Path, task: str, number: int, seed: int, has_text: bool = False) -> Path:
    """JSONL and images of `number` records."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(number):
        color = rng.choice(list(COLORS))
        pixels = torch.randint(0, 60, (40, 48, 3), generator=torch.Generator().manual_seed(seed * 1000 + i))
        image = Image.fromarray((pixels + torch.tensor(COLORS[color])).clamp(max=255).byte().numpy())
        image.save(folder / f"{seed}_{i}.png")
        row: dict[str, Any] = {"id": f"{seed}-{i}", "image": f"{seed}_{i}.png"}
        if task == "caption":
            row["captions"] = [f"a {color} square" + ", seen from afar" * (i % 3), f"one square in {color}"]
        elif task == "vqa":
            row |= {"question": "what color is it?" + " really?" * (i % 3), "answers": [color] * 8 + ["black", "white"]}
        else:
            row["label"] = rng.choice(["yes", "no"]) if has_text else color
        if has_text:
            row["text"] = f"{color} things"
        rows.append(row)
    path = folder / f"{task}_{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def checkpoint(backbones: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint as the reference makes them, whose gates are open, and the flags that name its backbones."""
    flags = [flag for flag in backbones if not flag.startswith("--offline")]
    paths = dict(flag.removeprefix("--").split("=") for flag in flags)
    torch.manual_seed(3)
    model, _, _ = create_model_and_transforms(
        paths["vision_encoder_path"], paths["vision_encoder_pretrained"], paths["lm_path"], use_local_files=True
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(1.0)
            elif parameter.requires_grad and parameter.ndim > 1 and "new_rows" not in name:
                parameter.mul_(4.0)
        # A random model is sure of nothing, and would end each text at once.
        model.lang_encoder.get_input_embeddings().weight.mul_(20.0)
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    torch.save(dict(trained_tensors(model)), path)
    return [str(path), *flags, "--cross_attn_every_n_layers=1", "--offline"]


def command(checkpoint: list[str], folder: Path, task: str, *more: str, has_text: bool = False) -> list[str]:
    data = write_data(folder / "data", task, TEST, seed=1, has_text=has_text)
    context = write_data(folder / "data", task, CONTEXT, seed=2, has_text=has_text)
    return [
        *checkpoint,
        *(f"--task={task}", f"--data={data}", f"--context={context}", f"--output_dir={folder / 'out'}"),
        *("--caption_tokenizer=simple", "--batch_size=4", "--workers=1", "--seeds=2", *more),
    ]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


def predictions(folder: Path, condition: str) -> list[dict[str, Any]]:
    lines = (folder / "out" / "predictions" / f"{condition}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# End to end


def test_captions(checkpoint: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*command(checkpoint, tmp_path, "caption"), "--shots", "0", "2"])
    assert "CIDEr, 13 samples" in capsys.readouterr().out
    found = results(tmp_path)
    assert found["metric"] == "CIDEr"
    assert {"ROUGE-L", "BLEU-4"} <= found["results"][0]["scores"].keys()
    of = {(one["shots"], one["variant"]): one for one in found["results"]}
    assert of.keys() == {(0, "images"), (0, "blank"), (2, "images"), (2, "blank"), (2, "shuffled")}
    assert len(of[2, "images"]["scores"]["CIDEr"]["seeds"]) == 2
    assert len(of[2, "blank"]["scores"]["CIDEr"]["seeds"]) == 1
    rows = predictions(tmp_path, "shots_2.seed_0.images")
    assert [row["index"] for row in rows] == list(range(TEST))
    assert all(len(row["demonstrations"]) == 2 for row in rows)
    page = (tmp_path / "out" / "results.html").read_text()
    assert page.count("data:image/jpeg") == TEST
    assert "blank images" in page
    assert "shuffled answers" in page
    without_scripts = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    assert "http" not in without_scripts, "nothing comes from a network"
    assert "official PTB tokenizer" in page


def test_answers(checkpoint: list[str], tmp_path: Path) -> None:
    main([*command(checkpoint, tmp_path, "vqa"), "--shots", "2", "--controls", "--demonstrations=rices"])
    found = results(tmp_path)
    assert found["metric"] == "VQA accuracy"
    (one,) = found["results"]
    assert one["seeds"] == [0], "RICES chooses the same on every seed"


@pytest.mark.parametrize("has_text", [False, True])
def test_classes(checkpoint: list[str], tmp_path: Path, has_text: bool) -> None:
    main([*command(checkpoint, tmp_path, "classify", has_text=has_text), "--shots", "0", "3"])
    found = results(tmp_path)
    assert found["metric"] == ("ROC AUC" if has_text else "accuracy")
    assert ("Is it hateful?" in found["settings"]["prompt"]) == has_text
    rows = predictions(tmp_path, "shots_3.seed_1.images")
    accuracy = sum(row["prediction"] == row["truth"][0] for row in rows) / TEST
    of = next(one for one in found["results"] if one["variant"] == "images" and one["shots"] == 3)
    assert of["scores"]["accuracy"]["seeds"][1] == pytest.approx(100 * accuracy, abs=1e-3)


def test_each_image_is_encoded_once(checkpoint: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    from open_flamingo import Flamingo

    encode = Flamingo.encode_images
    monkeypatch.setattr(Flamingo, "encode_images", lambda self, x: (seen.append(len(x)), encode(self, x))[1])
    main([*command(checkpoint, tmp_path, "vqa"), "--shots", "0", "4"])
    assert sum(seen) <= TEST + CONTEXT + 1, "a blank one too"


def test_batches_say_what_each_prompt_alone_does(checkpoint: list[str], tmp_path: Path) -> None:
    """Sorted, padded and with images encoded apart, as one prompt with its images after the other; but for rounding, no more."""
    main([*command(checkpoint, tmp_path, "caption"), "--shots", "3", "--controls", "--seeds=1"])
    paths = dict(flag.removeprefix("--").split("=") for flag in checkpoint[1:] if "=" in flag)
    model, image_processor, tokenizer = load(
        checkpoint[0],
        vision_encoder_path=paths["vision_encoder_path"],
        vision_encoder_pretrained=paths["vision_encoder_pretrained"],
        lm_path=paths["lm_path"],
        cross_attn_every_n_layers=1,
    )
    test = read_records(tmp_path / "data" / "caption_1.jsonl", "caption", "--data")
    pool = {one.id: one for one in read_records(tmp_path / "data" / "caption_2.jsonl", "caption", "--context")}
    for record, row in zip(test, predictions(tmp_path, "shots_3.seed_0.images"), strict=True):
        shown = [pool[name] for name in row["demonstrations"]]
        text = "".join(f"<image>Output:{one.answers[0]}<|endofchunk|>\n" for one in shown) + "<image>Output:"
        pictures = [image_processor(Image.open(one.image)) for one in (*shown, record)]
        prompt = tokenizer(text, return_tensors="pt")
        out = model.generate(
            torch.stack(pictures)[None, :, None],
            prompt["input_ids"],
            max_new_tokens=20,
            num_beams=3,
            length_penalty=0.0,
        )
        said = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["prediction"] == answer_of("caption", said)


def test_ranks_share_the_work_and_give_the_same(checkpoint: list[str], tmp_path: Path) -> None:
    program = ROOT / "scripts" / "evaluate" / "__main__.py"
    for task in ("caption", "classify"):
        runs = {}
        for ranks in (1, 2, 4) if task == "caption" else (1, 2):
            folder = tmp_path / f"{task}{ranks}"
            flags = [*command(checkpoint, folder, task), "--shots", "2"]
            flags += ["--demonstrations=rices"] if task == "classify" else []
            if ranks == 1:
                main(flags)
            else:
                finished(run_ranks(ranks, program, *flags))
            runs[ranks] = (results(folder)["results"], predictions(folder, "shots_2.seed_0.images"))
            parts = list((folder / "out" / "predictions").glob("shots_2.seed_0.images.rank*.jsonl"))
            assert sum(part.stat().st_size > 0 for part in parts) == ranks
        said = {row["prediction"] for row in runs[1][1]}
        assert len(said) > 1
        assert "" not in said
        for ranks in runs:
            assert [row["prediction"] for row in runs[ranks][1]] == [row["prediction"] for row in runs[1][1]]
            assert runs[ranks][0] == runs[1][0]


def test_goes_on_after_a_kill(checkpoint: list[str], tmp_path: Path) -> None:
    """kill -9 in the middle, and a line that was not finished."""
    whole = [*command(checkpoint, tmp_path / "whole", "vqa"), "--shots", "0", "2"]
    main(whole)
    flags = [*command(checkpoint, tmp_path / "killed", "vqa"), "--shots", "0", "2"]
    process = torchrun(2, *PROGRAM, *flags)
    folder = tmp_path / "killed" / "out" / "predictions"
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in folder.glob("shots_0.seed_1*.rank*.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    kill(process)
    assert not (tmp_path / "killed" / "out" / "results.json").exists()
    part = next(path for path in folder.glob("shots_0.seed_1*.rank*.jsonl") if path.stat().st_size)
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    before = (folder / "shots_0.seed_0.images.rank0.jsonl").read_bytes()
    finished(torchrun(2, *PROGRAM, *flags))
    assert (folder / "shots_0.seed_0.images.rank0.jsonl").read_bytes() == before
    for condition in ("shots_0.seed_0.images", "shots_0.seed_1.images", "shots_2.seed_1.images"):
        assert predictions(tmp_path / "killed", condition) == predictions(tmp_path / "whole", condition)
    assert results(tmp_path / "killed")["results"] == results(tmp_path / "whole")["results"]
    # More shots go on in the same folder; other settings need another.
    main([*flags, "1"])
    assert {one["shots"] for one in results(tmp_path / "killed")["results"]} == {0, 1, 2}
    with pytest.raises(SystemExit, match="num_beams was 3, now 1"):
        main([*flags, "--num_beams=1"])
    with pytest.raises(SystemExit, match="image_dir was None, now "):
        main([*flags, f"--image_dir={tmp_path / 'killed' / 'data'}"])


# ---------------------------------------------------------------------------------------------------------------------
# Refused before the model is built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flags, data: flags.__setitem__(0, "nowhere.pt"), "CHECKPOINT: there is no 'nowhere.pt'"),
        (lambda flags, data: data.write_text("{}\n"), r"--data: .*line 1: lacks 'image'"),
        (lambda flags, data: data.write_text("[1]\n"), r"line 1: is no JSON object"),
        (
            lambda flags, data: data.write_text("{\n"),
            r"line 1: .*--task vqa needs JSON with image and question and answers",
        ),
        (
            lambda flags, data: data.write_text('{"image": "a.png", "question": "?", "answers": "yes"}\n'),
            "must be a list",
        ),
        (lambda flags, data: data.write_text(""), "has no line"),
        (
            lambda flags, data: data.write_text('{"image": "gone.png", "question": "?", "answers": ["a"]}\n'),
            r"--data: .*: 1 of 1 images do not exist \(line 1: .*gone.png\)",
        ),
        (
            lambda flags, data: data.write_text(2 * (data.read_text().splitlines()[0] + "\n")),
            "lines 1 and 2 have the same id",
        ),
        (lambda flags, data: flags.append("--prompt=<image>{question}"), "--prompt: {answer} must stand in it once"),
        (lambda flags, data: flags.append("--prompt={question}{answer}"), "--prompt: <image> must stand in it once"),
        (lambda flags, data: flags.append("--prompt=<image>{quest}{answer}"), "--prompt: fields are"),
        (lambda flags, data: flags.append("--classes=a"), "--classes belongs to --task classify"),
        (
            lambda flags, data: flags.extend(["--shots", "0", "10"]),
            "--context has 9 other images, which is too few for 10 demonstrations: give fewer --shots",
        ),
    ],
)
def test_mistakes_are_named_before_the_model_is_built(
    change: Any, message: str, checkpoint: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = command(checkpoint, tmp_path, "vqa")
    change(flags, tmp_path / "data" / "vqa_1.jsonl")
    monkeypatch.setattr("open_flamingo.load", lambda *args, **kwargs: pytest.fail("built"), raising=False)
    with pytest.raises(SystemExit, match=message):
        main(flags)


@pytest.mark.parametrize("demonstrations", ["random", "rices"])
def test_a_broken_image_of_one_rank_ends_all(checkpoint: list[str], tmp_path: Path, demonstrations: str) -> None:
    flags = [*command(checkpoint, tmp_path, "vqa"), "--shots=1", f"--demonstrations={demonstrations}"]
    (tmp_path / "data" / "1_3.png").write_bytes(b"no image")
    process = run_ranks(2, ROOT / "scripts" / "evaluate" / "__main__.py", *flags, patience=300)
    started = time.monotonic()
    output, _ = process.communicate()
    assert process.returncode == 1
    assert time.monotonic() - started < 250, "no rank waits for the other"
    assert output.count("--data, line 4: the image") == 2, output  # each rank says it
    assert "1_3.png cannot be read" in output


def test_full_memory_is_told_in_a_line(checkpoint: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nProcess 1 has 80 GiB.")

    monkeypatch.setattr("open_flamingo.Flamingo.encode_images", full)
    with pytest.raises(SystemExit, match=r"^error: CUDA out of memory.*GiB\. Try a smaller --batch_size"):
        main([*command(checkpoint, tmp_path, "vqa"), "--shots=1"])


def test_beams_that_cannot_share_a_prompt_do_not(
    checkpoint: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from open_flamingo import Flamingo

    def run(name: str) -> list[dict[str, Any]]:
        main([*command(checkpoint, tmp_path / name, "vqa"), "--shots=2", "--controls", "--seeds=1"])
        return predictions(tmp_path / name, "shots_2.seed_0.images")

    monkeypatch.setitem(TOLERANCE, torch.float32, 5e-5)  # this tiny model hardly attends to its prompt
    whole = run("whole")
    assert "each beam computes" not in caplog.text
    right = Flamingo._prompt_cache
    monkeypatch.setattr(Flamingo, "_prompt_cache", lambda self, c, ids, *rest: right(self, c, ids.roll(1, 1), *rest))
    assert run("wrong") == whole
    assert "each beam computes its own prompt: with one cache, they differ by" in caplog.text


def test_nothing_reads_the_hubs_settings_before_offline_is_parsed() -> None:
    code = "import open_flamingo.scripts.caption, open_flamingo.scripts.evaluate.__main__, sys; sys.exit('huggingface_hub.constants' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_captions_need_java(checkpoint: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs Java.*--caption_tokenizer simple"):
        main([*command(checkpoint, tmp_path, "caption"), "--caption_tokenizer=ptb"])


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and demonstrations


def record(i: int, **kwargs: Any) -> Record:
    return Record(str(i), Path(f"{i}.png"), (f"answer {i}",), **kwargs)


def test_the_papers_prompts() -> None:
    one = Record("0", Path("a"), (" a cat ",), "what is it? ", "so it <image> goes")
    shown = Record("1", Path("b"), ("a dog",), "who?", "hey")
    prompt = Prompt.parse(default_prompt("caption", [one]), "caption")
    assert prompt.text(one, [(shown, "a dog")]) == "<image>Output:a dog<|endofchunk|>\n<image>Output:"
    assert prompt.text(one, [(shown, "a dog")], has_images=False) == "Output:a dog<|endofchunk|>\n<image>Output:"
    prompt = Prompt.parse(default_prompt("vqa", [one]), "vqa")
    assert prompt.text(one, [(shown, " a dog")]) == (
        "<image>Question:who? Short answer:a dog<|endofchunk|>\n<image>Question:what is it? Short answer:"
    )
    yes, no, cat = (Record(str(i), Path("a"), (label,), text="hey") for i, label in enumerate(["yes", "no", "cat"]))
    assert default_prompt("classify", [yes, no]) == HATEFUL_MEMES
    assert default_prompt("classify", [yes, no, cat]) == PROMPTS["classify"], (
        "what is asked is not whether it is hateful"
    )
    silent = Record("3", Path("a"), ("no",), line=7, flag="--context")
    assert default_prompt("classify", [silent]) == PROMPTS["classify"]
    with pytest.raises(ValueError, match="--context, line 7: lacks text, which others have"):
        default_prompt("classify", [yes, silent])
    prompt = Prompt.parse(HATEFUL_MEMES, "classify")
    assert prompt.query(one) == "<image>is an image with: 'so it image goes' written on it. Is it hateful? Answer:"


def test_a_brace_that_is_text() -> None:
    prompt = Prompt.parse("<image>{{answer}} is {question}: {answer}}}", "vqa")
    one = Record("0", Path("a"), ("a cat",), "what?")
    assert prompt.text(one, [(one, "a cat")]) == "<image>{answer} is what?: a cat}<image>{answer} is what?: "


def test_a_line_ends_at_a_new_line_alone(tmp_path: Path) -> None:
    """JSON may hold U+2028, U+2029 and U+0085 as they are."""
    text = "a\u2028b\u2029c\u0085d"
    path = tmp_path / "data.jsonl"
    rows = [{"id": None, "image": f"{i}.png", "caption": text} for i in range(2)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    records = read_records(path, "caption", "--data")
    assert [one.answers for one in records] == [(text,)] * 2
    assert [one.id for one in records] == ["1", "2"], "an id of null is none"
    (tmp_path / "memes.jsonl").write_text(
        f'{{"id": 1, "img": "a.png", "label": 0, "text": "{text}"}}\n', encoding="utf-8"
    )
    annotations(["hateful_memes", str(tmp_path / "memes.jsonl"), "-o", str(tmp_path / "out.jsonl")])
    (one,) = read_records(tmp_path / "out.jsonl", "classify", "--data")
    assert one.text == text


def test_the_answer_of_a_generated_text() -> None:
    assert answer_of("caption", ' a "cat"Output:a dog') == "a cat"
    assert answer_of("vqa", "red, I think") == "red"
    assert answer_of("vqa", "red Question:what") == "red"


def test_random_demonstrations_depend_on_seed_and_query_alone() -> None:
    pool = [record(i) for i in range(20)]
    chosen = random_demonstrations(pool, record(3), 8, seed=0)
    assert len(set(chosen)) == 8
    assert 3 not in random_demonstrations(pool, record(3), 19, seed=0), "its own image"
    assert random_demonstrations(pool, record(3), 4, seed=0) == chosen[:4]
    assert random_demonstrations(pool, record(3), 8, seed=1) != chosen
    assert random_demonstrations(pool, record(4), 8, seed=0) != chosen
    counts = [0] * 20
    for i in range(2000):
        for place in random_demonstrations(pool, record(100 + i), 5, seed=0):
            counts[place] += 1
    assert min(counts) > 420  # of 500 expected
    assert max(counts) < 580


def test_shuffled_demonstrations_have_anothers_answer() -> None:
    answers = list("abcde")
    for seed in range(20):
        shuffled = shuffled_answers(answers, record(0), seed)
        assert sorted(shuffled) == answers
        assert all(a != b for a, b in zip(answers, shuffled))


def test_the_most_similar_image_comes_last() -> None:
    pool = [record(i) for i in range(5)]
    features = torch.eye(5)
    query = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.0])
    assert most_similar(query, features, pool, record(9), 3) == [3, 1, 2]
    assert most_similar(query, features, pool, record(2), 2) == [3, 1], "without itself"
    same = [record(i % 2) for i in range(100)]  # two images, each fifty times
    features = torch.eye(2)[torch.arange(100) % 2]
    assert most_similar(torch.tensor([1.0, 0.0]), features, same, record(1), 3) == [4, 2, 0], "ties in the pool's order"
    assert most_similar(torch.tensor([1.0, 0.0]), features, same, record(0), 40) == list(range(79, 0, -2))
    with pytest.raises(ValueError, match="--context has 50 other images"):
        most_similar(torch.tensor([1.0, 0.0]), features, same, record(0), 51)


def test_conditions() -> None:
    names = [condition.name for condition in conditions([4, 0, 1], 2, ["blank", "shuffled"], 1, has_rices=False)]
    assert names == [
        *("shots_0.seed_0.images", "shots_0.seed_1.images", "shots_0.seed_0.blank"),
        *("shots_1.seed_0.images", "shots_1.seed_1.images", "shots_1.seed_0.blank"),
        *("shots_4.seed_0.images", "shots_4.seed_1.images", "shots_4.seed_0.blank", "shots_4.seed_0.shuffled"),
    ]
    assert Condition(4, 1) not in conditions([0, 4], 3, [], 1, has_rices=True)
    assert Condition(0, 1) in conditions([0, 4], 3, [], 1, has_rices=True)


class Letters:
    """A tokenizer of one token per letter."""

    def __call__(self, text: str) -> Any:
        return type("Encoding", (), {"input_ids": list(text.encode())})


def test_demonstrations_for_which_there_is_no_room_are_left_out() -> None:
    prompt = Prompt.parse("<image>{answer};", "vqa")
    test, pool = [record(0), record(1)], [record(i) for i in range(10, 20)]
    full = list(PromptBuilder(test, pool, prompt, Letters()).items(Condition(4, 0)))
    short = list(PromptBuilder(test, pool, prompt, Letters(), max_tokens=45).items(Condition(4, 0)))
    assert [len(item.images) for item in full] == [5, 5]
    assert [item.left_out for item in short] == [2, 2]
    assert short[0].demonstrations == full[0].demonstrations[-2:]
    assert len(short[0].images) == 3
    with pytest.raises(ValueError, match="--data, line 0: its prompt has 7 tokens"):
        list(PromptBuilder(test, pool, prompt, Letters(), max_tokens=5).items(Condition(4, 0)))


def test_batches_hold_prompts_of_one_length() -> None:
    pool = [record(i, question="?" * i) for i in range(10)]
    items = list(
        PromptBuilder(pool, pool, Prompt.parse("<image>{question}{answer}", "vqa"), Letters()).items(Condition(0, 0))
    )
    made = batches(items, 4)
    assert [len(batch) for batch in made] == [2, 4, 4]
    lengths = [[len(item.input_ids) for item in batch] for batch in made]
    assert sum(max(of) - min(of) for of in lengths) <= max(map(max, lengths)) - min(map(min, lengths))


def test_latents_are_those_of_the_model(tmp_path: Path) -> None:
    model = flamingo(language_model("llama", True))
    pictures = images(2, 3)
    keys = [Path(str(i)) for i in range(6)]
    pixels = dict(zip(keys, pictures.flatten(0, 2)))
    reader = Images(lambda image: image, 1)
    reader._read = pixels.__getitem__  # type: ignore[method-assign, assignment]
    latents = Latents(model, reader, torch.device("cpu"), capacity=4)
    batch = latents.batch([keys[:3], keys[3:5]])
    torch.testing.assert_close(batch[0], model._encode(pictures[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch[1, :2], model._encode(pictures[1, :2]), atol=1e-5, rtol=1e-5)
    assert not batch[1, 2].any()
    assert latents.encoded == 5
    latents.batch([keys[2:5]])
    assert latents.encoded == 5
    latents.batch([keys[:1]])  # 0 had to go
    assert latents.encoded == 6


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods of classes


class Words:
    """Class names that are lists of token ids."""

    pad_token_id = PAD

    def __call__(self, name: list[int], add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": name})


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_likelihoods_are_those_of_whole_texts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = flamingo(language_model(family, True)).eval()
    ids = torch.tensor([[3, IMAGE, 5, 6, IMAGE, 8], [PAD, PAD, PAD, IMAGE, 12, 13]])
    mask = (ids != PAD).long()
    names = ClassNames([[7], [9, 10, 11], [9, 4], [20, 21, 22]], Words(), torch.device("cpu"))
    model.cache_latents(torch.stack([model.encode_images(row.flatten(0, 1)) for row in images(2, 2)]), [2, 1])
    uncached = class_log_likelihoods(model, ids, mask, names, use_cache=False)

    # A name and its prompt alone, without padding, by the loss of labels.
    for row, (own_ids, count) in enumerate([(ids[0], 2), (ids[1, 3:], 1)]):
        for name, of in enumerate([[7], [9, 10, 11], [9, 4], [20, 21, 22]]):
            text = torch.cat([own_ids, torch.tensor(of)])[None]
            labels = text.clone()
            labels[:, : len(own_ids)] = -100
            loss = model(images(2, 2)[row : row + 1, :count], text, labels=labels).loss
            torch.testing.assert_close(uncached[row, name], -loss, atol=2e-4, rtol=1e-4)

    if not can_use_cache(model, ids, mask, names):
        assert family in {"falcon_h1", "zamba2", "granite_hybrid"}, "attention alone can go on by several tokens"
        return
    for most in (1 << 14, 40):  # all names at once, and in several passes
        monkeypatch.setattr("open_flamingo.scripts.evaluate.likelihood.MAX_TOKENS", most)
        cached = class_log_likelihoods(model, ids, mask, names)
        torch.testing.assert_close(cached, uncached, atol=2e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Scores

CAPTIONS = {
    "1": ["A man riding a wave on top of a surfboard.", "a surfer rides a large wave", "A man's on a surfboard."],
    "2": ["Two dogs play in the snow!", "two dogs are playing outside"],
    "3": ["A plate of food with broccoli, rice and meat.", "a plate topped with meat and vegetables"],
}
SAID = {"1": "a man riding a wave on a surfboard", "2": "a dog in the snow", "3": ""}


@needs_java
@only_at_length
def test_captions_are_scored_as_by_the_official_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through its COCO classes and files, but for SPICE, which downloads models."""
    from pycocoevalcap import eval as official
    from pycocotools.coco import COCO

    class NoSpice:
        def compute_score(self, gts: Any, res: Any) -> tuple[float, list[float]]:
            return 0.0, [0.0] * len(gts)

        def method(self) -> str:
            return "none"

    monkeypatch.setattr(official, "Spice", NoSpice)
    said = SAID | {"3": "broccoli and rice on a plate"}
    truth = [
        {"image_id": int(key), "id": 10 * int(key) + i, "caption": text}
        for key, of in CAPTIONS.items()
        for i, text in enumerate(of)
    ]
    (tmp_path / "truth.json").write_text(
        json.dumps({"images": [{"id": int(key)} for key in CAPTIONS], "annotations": truth, "info": {}, "licenses": []})
    )
    (tmp_path / "said.json").write_text(
        json.dumps([{"image_id": int(key), "caption": text} for key, text in said.items()])
    )
    coco = COCO(str(tmp_path / "truth.json"))
    program = official.COCOEvalCap(coco, coco.loadRes(str(tmp_path / "said.json")))
    program.evaluate()
    ours = CaptionScorer(CAPTIONS)(said)
    names = {"CIDEr": "CIDEr", "METEOR": "METEOR", "ROUGE-L": "ROUGE_L"} | {
        f"BLEU-{n}": f"Bleu_{n}" for n in range(1, 5)
    }
    assert ours.keys() == names.keys()
    for name, theirs in names.items():
        assert ours[name] == pytest.approx(100 * program.eval[theirs], abs=1e-9), name
    empty = CaptionScorer(CAPTIONS)(SAID)
    assert 0 < empty["CIDEr"] < ours["CIDEr"], "an empty caption counts as one, and shifts no other"
    simple = CaptionScorer(CAPTIONS, "simple")(said)
    assert simple["CIDEr"] == pytest.approx(ours["CIDEr"], rel=0.02)


def test_simple_tokens() -> None:
    assert simple_tokens("A man's well-known dog, isn't it?") == "a man 's well-known dog is n't it"


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes.", "yes"),
        ("dont", "don't"),
        ("Couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("two", "2"),
        ("none", "0"),
        ("The Cat", "cat"),
        ("a pair of shoes", "pair of shoes"),
        ("100,978", "100978"),
        ("2.5", "2.5"),
        ("2:50 pm", "2:50 pm"),
        ("girl's", "girl's"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("U.S.A.", "usa"),
        ("left\nside\t", "left side"),
        ("red, white", "red white"),
    ],
)
def test_answers_are_normalized_as_documented(answer: str, normal: str) -> None:
    """visualqa.org/evaluation.html."""
    assert normalize_answer(answer) == normal


def test_vqa_accuracy_leaves_each_person_out() -> None:
    def accuracy(same: int) -> float:
        return vqa_accuracy("Two", ["2"] * same + ["other"] * (10 - same))

    # 10 choose 9: with k who agree, k/10 of the sets have k - 1 of them, the others k.
    assert [round(accuracy(k), 4) for k in range(5)] == [0.0, 0.3, 0.6, 0.9, 1.0]
    assert vqa_accuracy("cat", ["a cat"]) == 1.0, "one person alone"


def test_area_under_the_roc_curve() -> None:
    assert (
        roc_auc([False, False, True, True], [0.1, 0.4, 0.35, 0.8]) == 0.75
    )  # the example of scikit-learn's documentation
    assert roc_auc([True, False, True], [0.5, 0.5, 0.5]) == 0.5
    assert roc_auc([True, True], [0.1, 0.2]) != roc_auc([True, True], [0.1, 0.2]), "NaN"


# ---------------------------------------------------------------------------------------------------------------------
# Annotation files

VQA_QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"image_id": 42, "question": "What is it?", "question_id": 420}],
}
KARPATHY = {
    "images": [
        {"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "split": "test", "cocoid": 42,
         "sentences": [{"raw": "A cat."}, {"raw": "One cat."}]},
        {"filepath": "train2014", "filename": "COCO_train2014_000000000007.jpg", "split": "train", "cocoid": 7,
         "sentences": [{"raw": "A dog."}]},
    ],
    "dataset": "coco",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "files", "flags", "row"),
    [
        (
            "coco",
            {"captions_val2014.json": {
                "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}],
                "annotations": [{"image_id": 42, "id": 1, "caption": "A cat."}, {"image_id": 42, "id": 2, "caption": "One cat."}],
            }},
            [],
            {"id": 42, "image": "val2014/COCO_val2014_000000000042.jpg", "captions": ["A cat.", "One cat."]},
        ),
        (
            "coco",
            {"dataset_coco.json": KARPATHY},
            ["--split", "test"],
            {"id": 42, "image": "val2014/COCO_val2014_000000000042.jpg", "captions": ["A cat.", "One cat."]},
        ),
        (
            "flickr30k",
            {"dataset_flickr30k.json": {"images": [{"filename": "1.jpg", "split": "test", "imgid": 0, "sentences": [{"raw": "Hi."}]}]}},
            ["--split", "test", "--image_folder", "flickr30k-images"],
            {"id": "1.jpg", "image": "flickr30k-images/1.jpg", "captions": ["Hi."]},
        ),
        (
            "flickr30k",
            {"results_20130124.token": "1.jpg#0\tTwo men .\n1.jpg#1\tMen .\n"},
            [],
            {"id": "1.jpg", "image": "1.jpg", "captions": ["Two men .", "Men ."]},
        ),
        (
            "vqav2",
            {"questions.json": VQA_QUESTIONS, "annotations.json": {"annotations": [{
                "question_id": 420, "image_id": 42, "question_type": "what is", "answer_type": "other", "multiple_choice_answer": "cat",
                "answers": [{"answer": "cat", "answer_confidence": "yes", "answer_id": 1}, {"answer": "dog", "answer_confidence": "no", "answer_id": 2}],
            }]}},
            [],
            {"id": 420, "image": "val2014/COCO_val2014_000000000042.jpg", "question": "What is it?", "answers": ["cat", "dog"]},
        ),
        (
            "okvqa",
            {"annotations.json": {"annotations": [{
                "question_id": 420, "image_id": 42,
                "answers": [{"answer": "surf", "raw_answer": "surfing", "answer_confidence": "yes", "answer_id": 1}],
            }]}, "questions.json": VQA_QUESTIONS},
            [],
            {"id": 420, "image": "val2014/COCO_val2014_000000000042.jpg", "question": "What is it?", "answers": ["surfing"]},
        ),
        (
            "textvqa",
            {"TextVQA_0.5.1_val.json": {"dataset_type": "val", "data": [
                {"question": "what brand?", "image_id": "003a8ae2ef43b901", "question_id": 34602, "answers": ["nokia", "nokia"]}]}},
            [],
            {"id": 34602, "image": "train_images/003a8ae2ef43b901.jpg", "question": "what brand?", "answers": ["nokia", "nokia"]},
        ),
        (
            "vizwiz",
            {"val.json": [{"image": "VizWiz_val_00000000.jpg", "question": "Ok?", "answerable": 1, "answer_type": "other",
                           "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}]}]},
            [],
            {"id": "VizWiz_val_00000000.jpg", "image": "val/VizWiz_val_00000000.jpg", "question": "Ok?", "answers": ["unanswerable"]},
        ),
        (
            "hateful_memes",
            {"dev_seen.jsonl": '{"id": 8291, "img": "img/08291.png", "label": 1, "text": "white people"}\n'},
            [],
            {"id": 8291, "image": "img/08291.png", "text": "white people", "label": "yes"},
        ),
    ],
)  # fmt: skip
def test_annotation_files(
    kind: str, files: dict[str, Any], flags: list[str], row: dict[str, Any], tmp_path: Path
) -> None:
    paths = []
    for name, content in files.items():
        paths.append(tmp_path / name)
        paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
    out = tmp_path / "out.jsonl"
    annotations([kind, *map(str, paths), *flags, "-o", str(out)])
    assert [json.loads(line) for line in out.read_text().splitlines()] == [row]
    task = {"hateful_memes": "classify", "coco": "caption", "flickr30k": "caption"}.get(kind, "vqa")
    (read,) = read_records(out, task, "--data")
    assert read.id == str(row["id"])
    assert read.image == tmp_path / row["image"]


def test_an_annotation_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(KARPATHY))
    with pytest.raises(SystemExit, match=r"x.json: not as textvqa is published: there is no 'data'"):
        annotations(["textvqa", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match=r"it holds all splits: give --split \(one or more of test, train\)"):
        annotations(["coco", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match="two files are needed"):
        annotations(["vqav2", str(tmp_path / "x.json")])
    (tmp_path / "t.jsonl").write_text('{"id": 1, "img": "img/1.png", "text": "?"}\n')
    with pytest.raises(SystemExit, match="line 1 has no label: this split cannot be scored"):
        annotations(["hateful_memes", str(tmp_path / "t.jsonl")])


def test_a_blank_image_is_gray() -> None:
    assert set(read_image(None).getdata()) == {(128, 128, 128)}
