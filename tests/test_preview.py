"""`--preview`: what a run will be trained on, on a page; in a real browser where there is one."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_flamingo.train.arguments import parse_args
from open_flamingo.train.data.labels import IGNORE
from open_flamingo.train.data.loader import Batch, build_loader
from open_flamingo.train.data.options import data_options
from open_flamingo.train.distributed import World
from open_flamingo.train.model import model_from_flags
from open_flamingo.train.train import main
from tests.shards import document, picture, write_tar
from tests.test_page import CHROMIUM, browse, charts

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;\"'"
CHARTS = (
    "Tokens per sample, laion",
    "Similarity of each image to its sentence",
    "Images per document",
    "Tokens per sample, mmc4",
    "Image sizes",
)


def previewed(flags: list[str], folder: Path, *more: str, code: int = 0) -> str:
    """The page that these flags give."""
    command = [*flags, f"--run_name={folder}", *more]
    if code:
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == code
    else:
        main(command)
    return (folder / "preview.html").read_text()


def first_batches(flags: list[str], world: World) -> dict[str, Batch]:
    """The first batch of each dataset, from the loader that training makes."""
    args: Namespace = parse_args(flags)
    _, image_processor, tokenizer = model_from_flags(args, meta=True)
    batches = {}
    for kind, option in data_options(args, world, None).items():
        with build_loader(option, tokenizer, image_processor) as loader:
            batches[kind] = next(loader)
    return batches


def samples_of(page: str, kind: str) -> list[str]:
    section = page[page.index(f"<h2 id={kind}>") :]
    section = section[: section.index("<h2", 1)]
    return section.split("<div class=sample>")[1:]


def tokens_of(sample: str) -> list[tuple[str, int]]:
    """(classes, id) of each token but padding."""
    return [(names, int(i)) for names, i in re.findall(r"<span class='token ([\w ]+)' title='(\d+) ", sample)]


def images_of(sample: str) -> list[np.ndarray]:
    """uint8 [3, H, W] of each."""
    found = re.findall(r"data:image/png;base64,([\w+/=]+)", sample)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).transpose(2, 0, 1) for data in found]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_shows_what_the_first_batches_of_rank_0_are(flags: list[str], tmp_path: Path, workers: int) -> None:
    flags = [*flags, f"--workers={workers}"]
    page = previewed(flags, tmp_path / "run", "--preview=2", "--dry_run_ranks=2")
    assert "rank 0 of 2" in page
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preview.html"]
    for kind, batch in first_batches(flags, World(world_size=2, local_world_size=2)).items():
        shown = samples_of(page, kind)
        assert len(shown) == 2
        mirrored = 0
        for row, sample in enumerate(shown):
            assert html.escape(batch.keys[row]) in sample
            tokens = tokens_of(sample)
            length = len(tokens)
            assert [i for _, i in tokens] == batch.input_ids[row, :length].tolist()
            padding = batch.input_ids.shape[1] - length
            assert (f">padding × {padding}<" in sample) == (padding > 0)
            trained = [i > 0 and label != IGNORE for i, label in enumerate(batch.labels[row, :length].tolist())]
            assert ["trained" in names for names, _ in tokens] == trained
            assert all(("trained" in names) != ("masked" in names) for names, _ in tokens)
            assert sum("special" in names for names, _ in tokens) >= 1 + batch.image_counts[row]
            images = images_of(sample)
            assert len(images) == batch.image_counts[row]
            for image, expected in zip(images, batch.images[row], strict=False):
                assert np.array_equal(image, expected.numpy())
            # Each image stands right after its token.
            assert len(re.findall(r"&lt;image&gt;</span><span class=image><img", sample)) == len(images)
            mirrored += sample.count("mirrored")
            if kind == "mmc4":
                assert len(re.findall(r"<td>image \d<td>A \w+ \w+\.[^<]*<td>4\d\.\d\d?<td>used", sample)) == len(images)
        assert mirrored < sum(batch.image_counts)
    reasons = re.findall(r"<h3>single_image: (\d+)</h3>", page)
    assert int(reasons[0]) > 0
    assert tuple(charts(tmp_path / "run" / "preview.html")) == CHARTS
    without_scripts = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    assert "http" not in without_scripts, "nothing comes from a network"


def mmc4_document(change: Callable[[dict], None], images: int = 3, seed: int = 0) -> bytes:
    made = document(np.random.default_rng(seed), images, seed)
    change(made)
    return json.dumps(made).encode()


@pytest.fixture
def odd_flags(flags: list[str], tmp_path: Path) -> list[str]:
    """Of shards with a hostile, long or broken sample of each kind among a few good ones."""
    rng = np.random.default_rng(0)
    red = picture(rng, "red")

    def under(made: dict) -> None:
        matrix = np.array(made["similarity_matrix"])
        matrix[0] = np.where(matrix[0] > 20, 12.5, 0)
        made["similarity_matrix"] = matrix.tolist()
        made["text_list"][0] = HOSTILE

    def long(made: dict) -> None:
        made["text_list"][-1] += " and so on" * 300

    def icon(made: dict) -> None:
        made["image_info"][0]["image_base64"] = base64.b64encode(red).decode()

    def unlike(made: dict) -> None:
        made["similarity_matrix"] = (np.array(made["similarity_matrix"]) / 100).tolist()
        made["text_list"][1] = HOSTILE

    def wide(made: dict) -> None:
        made["text_list"] = ["More similarities than sentences."]

    def surrogate(made: dict) -> None:
        made["text_list"][0] = "\ud800" + HOSTILE

    laion = [
        ("a.jpg", red),
        ("a.txt", HOSTILE.encode()),
        ("b.jpg", red),
        ("b.txt", b"a word " * 60 + b"at last"),
        ("c.jpg", red[:200]),
        ("c.txt", HOSTILE.encode()),
        ("d.jpg", red),
        ("e.jpg", picture(rng, "blue", size=(400, 300))),
        ("e.txt", "größer 🦊\nthan allowed".encode()),
        ("f.png", red),
        ("f.txt", "größer 🦊\nthan most".encode()),
    ]
    write_tar(tmp_path / "laion.tar", laion)
    documents = [mmc4_document(change, seed=i) for i, change in enumerate((under, long, icon, unlike, surrogate))]
    documents += [mmc4_document(wide, seed=7), json.dumps({"is_gpt": 1, "example": 5, "image_map": {}}).encode()]
    documents += [b"{" + HOSTILE.encode(), mmc4_document(lambda made: None, images=8, seed=9)]
    write_tar(tmp_path / "mmc4.tar", [(f"{i}.json", data) for i, data in enumerate(documents)])
    changes = [
        f"--laion_shards={tmp_path}/laion.tar",
        f"--mmc4_shards={tmp_path}/mmc4.tar",
        "--mmc4_textsim_threshold=30",
    ]
    return [*flags, *changes, "--max_image_pixels=50000"]


def test_cut_off_under_the_threshold_and_left_out(odd_flags: list[str], tmp_path: Path) -> None:
    page = previewed(odd_flags, tmp_path / "run<b>", "--preview=12")
    assert "<h1>Preview of run&lt;b&gt;</h1>" in page
    body = page[page.index("<body>") :]
    without_charts = re.sub(r"<figure>.*?</figure>", "", body, flags=re.DOTALL)
    assert "<script" not in without_charts
    assert "<img src=x" not in without_charts
    assert html.escape(HOSTILE) in re.sub("</span><span class='token trained' title='[^']*'>", "", body)

    laion, mmc4 = (samples_of(page, kind) for kind in ("laion", "mmc4"))
    cut = next(sample for sample in laion if "Cut off" in sample)
    assert re.search(
        r"Cut off</b> \(\d+ tokens after the first 32, 0 &lt;image&gt; .* at last&lt;\|endofchunk\|&gt;", cut
    )
    assert len(tokens_of(cut)) == 32
    fox = next(sample for sample in laion if "🦊" in sample)
    assert "größer 🦊" in re.sub("<[^>]*>|⋯", "", fox)

    below = next(sample for sample in mmc4 if "under the threshold of 30" in sample)
    assert len(re.findall(r"<tr class=under><td><span class=image>.*?<td>12\.5<td>under", below)) == 1
    assert len(re.findall(r"<td>used", below)) == 2
    assert any(re.search(r"Cut off</b> \(\d+ tokens after the first 256.*and so on", sample) for sample in mmc4)
    assert any("in no pair: 1 image (" in sample for sample in mmc4)
    many = next(sample for sample in mmc4 if "beyond --mmc4_max_num_images" in sample)
    assert many.count("<td>used") == 6
    assert many.count("beyond") == 2

    left_out = page[page.index("<h2 id=laion_left_out>") :]
    reasons = {
        "corrupt_image": 1,
        "no_caption": 1,
        "image_too_large": 1,
        "no_match": 1,
        "bad_json": 1,
        "bad_document": 3,
    }
    for reason, examples in reasons.items():
        part = left_out[left_out.index(f"<h3>{reason}: ") :].split("<h3>")[1]
        assert part.startswith(reason)
        assert part.count("<div class=sample>") == examples
        assert int(re.match(r"\w+: ([\d,]+)<", part)[1].replace(",", "")) > 3  # type: ignore[index]
    assert "[too large]" in left_out
    assert "[not an image, 200 bytes]" in left_out
    assert "--mmc4_textsim_threshold" in left_out


def test_data_of_which_nothing_can_be_used_are_shown_and_the_code_is_1(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = previewed(flags, tmp_path / "run", "--preview=3", "--mmc4_textsim_threshold=100", code=1)
    assert "--mmc4_shards: 3 of the 3 mmc4 shards" in capsys.readouterr().err
    assert samples_of(page, "mmc4") == []
    assert len(samples_of(page, "laion")) == 3
    assert "<p class=problem>" in page
    part = page[page.index("<h3>no_match: ") :]
    assert "under the threshold of 100" in part
    assert "Similarity of each image to its sentence" in part


def test_it_ends_where_too_few_can_be_used(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_flamingo.train.data.watched.SAMPLES", 10)
    monkeypatch.setattr("open_flamingo.train.data.watched.SECONDS", 0.0)
    nothing = json.dumps({"text_list": ["No image."], "similarity_matrix": [], "image_info": []}).encode()
    documents = [nothing] * 38 + [mmc4_document(lambda made: None)] * 2
    write_tar(tmp_path / "mmc4.tar", [(f"{i}.json", data) for i, data in enumerate(documents)])
    changes = [f"--mmc4_shards={tmp_path}/mmc4.tar", "--batch_size_mmc4=8", "--train_num_samples_mmc4=32"]
    page = previewed([*flags, *changes], tmp_path / "run", "--preview=8", code=1)
    shown = samples_of(page, "mmc4")
    assert 0 < len(shown) < 8
    assert f"--mmc4_shards: only {len(shown)} of the first 80 samples can be used" in capsys.readouterr().err
    assert f"<h3>no_image: {80 - len(shown)}</h3>" in page


def test_wrong_flags_are_named(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*flags, "--preview=2", "--dry_run"])
    assert "--preview 2 and --dry_run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*flags, f"--run_name={tmp_path / 'run'}", "--preview=2", "--dry_run_ranks=3", "--data_lanes=16"])
    assert ended.value.code == 1
    assert "--data_lanes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: tests/launch/install.sh installs it")
def test_a_browser_draws_it_and_runs_nothing_of_the_data(odd_flags: list[str], tmp_path: Path) -> None:
    """OPEN_FLAMINGO_TEST_OUTPUT: a folder that keeps screenshots."""
    previewed(odd_flags, tmp_path / "run", "--preview=6")
    page = tmp_path / "run" / "preview.html"
    output = Path(os.environ.get("OPEN_FLAMINGO_TEST_OUTPUT", tmp_path)).absolute()
    output.mkdir(parents=True, exist_ok=True)
    measuring = tmp_path / "measuring.html"
    script = "<script>addEventListener('load', () => setTimeout(() => document.body.append(`widths: ${document.scrollingElement.scrollWidth} ${innerWidth} ${document.images.length} ${[...document.images].filter(i => i.naturalWidth).length}`), 5000))</script>"
    measuring.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    for width in (1280, 500):  # no window of Chromium is narrower
        shown = browse(measuring, f"--window-size={width},900", "--dump-dom").stdout
        figures = re.findall("<figure>.*?</figure>", shown, re.DOTALL)
        assert len(figures) == len(CHARTS)
        assert all('class="main-svg"' in figure for figure in figures)
        assert "<title>Preview of run</title>" in shown
        whole, window, images, loaded = map(int, re.findall(r"widths: (\d+) (\d+) (\d+) (\d+)<", shown)[0])
        assert whole <= window <= width
        assert images == loaded > 12
        browse(page, f"--window-size={width},6000", f"--screenshot={output}/preview-{width}.png")
        assert (output / f"preview-{width}.png").stat().st_size > 50_000
