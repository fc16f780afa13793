"""The demo's small world: images of one to three equal shapes, and English captions that say all there is to say of them.

An image has five attributes: count, size, color, form and place ("two large red crosses at the top"). Training flips
images left to right, so no word of this world means left or right: a place is one of three bands, and shapes stand anywhere
along it.

The *held-out* combinations of the five appear in no image and no text of any training stage; held-out images show
nothing else. Each of their words, and each pair of them, is common in training: whoever describes held-out images
has learned the words, not the images.
"""

import itertools
import random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZES = {"small": 17, "large": 30}  # radius in pixels
COLORS = {  # all lighter than the ground
    "red": (225, 40, 45),
    "yellow": (245, 230, 60),
    "green": (50, 170, 60),
    "blue": (50, 100, 245),
    "purple": (165, 60, 200),
    "white": (250, 250, 250),
}
FORMS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}  # one, and several
PLACES = ("at the top", "in the middle", "at the bottom")
COUNTS = ("one", "two", "three")
IMAGE_SIZE = 192  # pixels, both sides
GRAIN = 64  # gray levels between the darkest and the lightest grain


class Scene(NamedTuple):
    """What an image shows, in words."""

    count: str
    size: str
    color: str
    form: str
    place: str


ATTRIBUTES = Scene._fields
VOCABULARY = {"count": COUNTS, "size": tuple(SIZES), "color": tuple(COLORS), "form": tuple(FORMS), "place": PLACES}


def is_held_out(scene: Scene) -> bool:
    """One combination in six, spread evenly: any two of its attributes occur together in training."""
    count, size, color, form, place = (VOCABULARY[name].index(getattr(scene, name)) for name in ATTRIBUTES)
    return (count + 3 * size + color + form + 2 * place) % 6 == 0


SCENES = tuple(Scene(*words) for words in itertools.product(*VOCABULARY.values()))
HELD_OUT = tuple(scene for scene in SCENES if is_held_out(scene))
TRAINING = tuple(scene for scene in SCENES if not is_held_out(scene))


def caption(scene: Scene) -> str:
    """`two large red crosses at the top`."""
    form = scene.form if scene.count == "one" else FORMS[scene.form]
    return f"{scene.count} {scene.size} {scene.color} {form} {scene.place}"


def render(rng: random.Random, scene: Scene | None) -> np.ndarray:
    """An image of `scene`, or of nothing, on a tinted, grainy ground: uint8 `(IMAGE_SIZE, IMAGE_SIZE, 3)`."""
    ground = rng.randint(30, 60)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(ground + rng.randint(-8, 8) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    cell = IMAGE_SIZE / 3
    columns = [] if scene is None else rng.sample(range(3), 1 + COUNTS.index(scene.count))
    for column in columns:
        assert scene is not None
        radius = SIZES[scene.size] * rng.uniform(0.95, 1.05)
        x = (column + 0.5) * cell + rng.uniform(-2, 2)
        y = (PLACES.index(scene.place) + 0.5) * cell + rng.uniform(-2, 2)
        color = tuple(channel + rng.randint(-12, 12) for channel in COLORS[scene.color])
        draw_form(draw, scene.form, x, y, radius, color)
    # The grain makes images differ, and their files larger than the 10 KB under which MMC4 images are dropped.
    grain = np.frombuffer(rng.randbytes(IMAGE_SIZE * IMAGE_SIZE), dtype=np.uint8) % GRAIN
    grain = grain.reshape(IMAGE_SIZE, IMAGE_SIZE, 1).astype(np.int16) - GRAIN // 2
    return np.clip(np.asarray(image, dtype=np.int16) + grain, 0, 255).astype(np.uint8)


def draw_form(draw: ImageDraw.ImageDraw, form: str, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    if form == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif form == "square":
        draw.rectangle((x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r), fill=fill)
    elif form == "cross":
        draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)
        draw.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)
    else:
        angles = [2 * np.pi * corner / 3 for corner in range(3)]
        draw.polygon([(x + r * np.sin(angle), y - r * np.cos(angle)) for angle in angles], fill=fill)
