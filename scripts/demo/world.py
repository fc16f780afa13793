"""The demo's small world: pictures of one or two shapes, and English captions that say all there is to say of them.

A shape has four attributes: place, size, colour and form ("at the top a large red cross"). Training flips pictures left to right,
so no word of this world means left or right: a place is one of three bands, and a shape stands anywhere along it.

The *held-out* combinations of the four appear in no picture and no text of any training stage; held-out pictures show
nothing else. Each of their words, and each pair of them, is common in training: whoever describes held-out pictures
has learned the words, not the pictures.
"""

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZES = {"small": 17, "large": 30}  # radius in pixels
COLOURS = {  # all lighter than the ground
    "red": (225, 40, 45),
    "yellow": (245, 230, 60),
    "green": (50, 170, 60),
    "blue": (50, 100, 245),
    "purple": (165, 60, 200),
    "white": (250, 250, 250),
}
FORMS = ("circle", "square", "triangle", "cross")
PLACES = ("at the top", "in the middle", "at the bottom")
ATTRIBUTES = ("place", "size", "colour", "form")
IMAGE_SIZE = 192  # pixels, both sides
MAX_SHAPES = 2
GRAIN = 64  # grey levels between the darkest and the lightest grain


class Shape(NamedTuple):
    place: str
    size: str
    colour: str
    form: str

    def __str__(self) -> str:
        return f"{self.place} a {self.size} {self.colour} {self.form}"


def is_held_out(shape: Shape) -> bool:
    """One combination in six, spread evenly: any two of its attributes occur together in training."""
    place, size = PLACES.index(shape.place), list(SIZES).index(shape.size)
    colour, form = list(COLOURS).index(shape.colour), FORMS.index(shape.form)
    return (2 * place + 3 * size + colour + form) % 6 == 0


SHAPES = tuple(Shape(*words) for words in itertools.product(PLACES, SIZES, COLOURS, FORMS))
HELD_OUT = tuple(shape for shape in SHAPES if is_held_out(shape))
TRAINING = tuple(shape for shape in SHAPES if not is_held_out(shape))


def caption(shapes: Sequence[Shape]) -> str:
    """`at the top a large red cross and in the middle a small blue circle`: shapes are named from top to bottom."""
    return " and ".join(str(shape) for shape in shapes)


def draw_scene(rng: random.Random, shapes: Sequence[Shape] = TRAINING) -> list[Shape]:
    """One or two of `shapes` in different places, from top to bottom."""
    count = rng.randint(1, MAX_SHAPES)
    while True:
        scene = rng.sample(shapes, count)
        if len({shape.place for shape in scene}) == count:
            return sorted(scene, key=lambda shape: PLACES.index(shape.place))


def render(rng: random.Random, shapes: Sequence[Shape]) -> np.ndarray:
    """A picture of the shapes on a tinted, grainy ground: uint8 `(IMAGE_SIZE, IMAGE_SIZE, 3)`."""
    ground = rng.randint(30, 60)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple(ground + rng.randint(-8, 8) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    cell = IMAGE_SIZE / 3
    for shape in shapes:
        radius = SIZES[shape.size] * rng.uniform(0.95, 1.05)
        x = (rng.randrange(3) + 0.5) * cell + rng.uniform(-3, 3)
        y = (PLACES.index(shape.place) + 0.5) * cell + rng.uniform(-2, 2)
        colour = tuple(channel + rng.randint(-12, 12) for channel in COLOURS[shape.colour])
        draw_form(draw, shape.form, x, y, radius, colour)
    # The grain makes pictures differ, and their files larger than the 10 KB under which MMC4 images are dropped.
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
