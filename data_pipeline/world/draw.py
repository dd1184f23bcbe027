"""Pixels of a scene, one frame at a time; a frame depends on the scene and its index alone.

In: `Scene`. Out: uint8 frames, so a film of any length needs the memory of one frame.
"""

from __future__ import annotations

import bisect
import colorsys
import functools
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.world.glyphs import bitmap
from data_pipeline.world.scene import COLOURS, SHAPES, Card, Ground, Mover, Scene
from hico_jax.shapes import Float, UInt8, ndarray

_DARK = (22, 22, 26)  # inside of a card
_RIM = (205, 205, 200)  # its frame


def render(scene: Scene) -> Iterator[UInt8[ndarray, "height width 3"]]:
    """All frames of the scene, in order; nothing is kept between frames but a few cached textures."""
    for index in range(scene.num_frames):
        yield frame(scene, index)


def frame(scene: Scene, index: int) -> UInt8[ndarray, "height width 3"]:
    """Frame `index` of the scene, at `index / fps` seconds."""
    time_s = index / scene.fps
    card = next((c for c in scene.cards if c.start_s <= time_s < c.end_s), None)
    if card is not None:
        canvas = still(card, scene.px)
    else:
        canvas = _ground(scene, time_s)
        for mover in scene.movers:
            if mover.visible(time_s):
                elapsed = time_s - mover.start_s
                x, y = mover.x + mover.vx * elapsed, mover.y + mover.vy * elapsed
                _blit(canvas, sprite(mover.shape, _pixels(mover.size, scene.px)), _shaded(mover), x, y)
    if scene.noise:
        bank = _noise(scene.px, scene.noise)
        dy, dx = np.random.default_rng((scene.seed, index)).integers(0, scene.px, 2)
        canvas = np.clip(canvas + bank[dy : dy + scene.px, dx : dx + scene.px], 0, 255).astype(np.uint8)
    return canvas


@functools.lru_cache(maxsize=512)
def sprite(content: str, side: int) -> Float[ndarray, "height width"]:
    """Coverage from 0 to 1 of a shape or a text, drawn `side` pixels high and wide with soft edges."""
    fine = 4 * side
    if content not in SHAPES:
        bits = bitmap(content)
        rows, columns = bits.shape
        scale = max(rows, columns)
        pick = np.arange(fine) * scale // fine
        square = np.zeros((scale, scale), bool)
        top, left = (scale - rows) // 2, (scale - columns) // 2
        square[top : top + rows, left : left + columns] = bits
        inside = square[pick][:, pick]
    else:
        axis = (np.arange(fine) + 0.5) / fine * 2 - 1
        x, y = axis[None, :], axis[:, None]
        inside = _inside(content, x, y)
    return inside.reshape(side, 4, side, 4).mean((1, 3)).astype(np.float32)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the square from -1 to 1 the shape covers."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius < 0.98
    if shape == "ring":
        return (radius < 0.98) & (radius > 0.55)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.88
    if shape == "triangle":
        return (y < 0.88) & (y > -0.95 + 1.9 * abs(x))
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) < 0.3
    turn = 2 * np.pi / 5  # a five-pointed star: its outline is a straight line in every tenth of the circle
    angle = abs((np.arctan2(x, -y) + turn / 2) % turn - turn / 2)
    x_in, y_in = 0.4 * np.cos(turn / 2), 0.4 * np.sin(turn / 2)
    return radius < y_in / (np.sin(angle) * (1 - x_in) + y_in * np.cos(angle))


def _pixels(size: float, px: int) -> int:
    return max(4, round(size * px))


def _shaded(event: Card | Mover) -> tuple[int, int, int]:
    red, green, blue = COLOURS[event.colour]
    return round(red * event.shade), round(green * event.shade), round(blue * event.shade)


@functools.lru_cache(maxsize=512)
def _card(
    content: str, colour: tuple[int, int, int], size: float, px: int, hint: str
) -> UInt8[ndarray, "height width 3"]:
    rim = max(2, px // 16)
    canvas = np.empty((px, px, 3), np.uint8)
    canvas[:] = _RIM
    canvas[rim:-rim, rim:-rim] = _DARK
    _blit(canvas, sprite(content, _pixels(size, px)), colour, 0.5, 0.5)
    return _written(canvas, hint) if hint else canvas


def _written(card: UInt8[ndarray, "px px 3"], hint: str) -> UInt8[ndarray, "px px 3"]:
    """The card with a hint along its lower edge."""
    image, px = Image.fromarray(card), card.shape[0]
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=max(8, px // 6))
    left, top, right, bottom = pen.textbbox((0, 0), hint, font=font)
    where = ((px - (right - left)) / 2 - left, px - 1.5 * (bottom - top) - top - px / 16)
    pen.rectangle((0, px - 2.2 * (bottom - top) - px / 16, px, px), fill=_DARK)
    pen.text(where, hint, fill=COLOURS["white"], font=font)
    return np.asarray(image)


def _blit(canvas: np.ndarray, alpha: np.ndarray, colour: tuple[int, int, int], x: float, y: float) -> None:
    """Paint one colour through a coverage mask centred at (x, y), cut at the border."""
    px, side = canvas.shape[0], alpha.shape[0]
    top, left = round(y * px - side / 2), round(x * px - side / 2)
    y0, y1, x0, x1 = max(top, 0), min(top + side, px), max(left, 0), min(left + side, px)
    if y0 >= y1 or x0 >= x1:
        return
    mask = alpha[y0 - top : y1 - top, x0 - left : x1 - left, None]
    region = canvas[y0:y1, x0:x1]
    region[:] = (region + mask * (np.array(colour, np.float32) - region) + 0.5).astype(np.uint8)


def _ground(scene: Scene, time_s: float) -> np.ndarray:
    """The haystack: texture under a panning camera, muted shapes drifting over it."""
    place = bisect.bisect_right(scene.grounds, time_s, key=lambda g: g.start_s) - 1
    ground = scene.grounds[place]
    texture = _texture(ground, scene.px)
    dx, dy = (int(v * time_s * scene.px) % scene.px for v in scene.pan)
    canvas = np.ascontiguousarray(texture[dy : dy + scene.px, dx : dx + scene.px])
    for shape, colour, size, x, y, vx, vy in _drifters(ground):
        # They leave on one side and come back on the other.
        span = 1 + size
        x_now = (x + (vx - scene.pan[0]) * time_s) % span - size / 2
        y_now = (y + (vy - scene.pan[1]) * time_s) % span - size / 2
        _blit(canvas, sprite(shape, _pixels(size, scene.px)), colour, x_now, y_now)
    return canvas


def _muted(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.1, 0.35), rng.uniform(0.25, 0.65))
    return round(255 * red), round(255 * green), round(255 * blue)


@functools.lru_cache(maxsize=16)
def _texture(ground: Ground, px: int) -> UInt8[ndarray, "height width 3"]:
    """A smooth random texture that tiles, two by two tiles so that panning is a slice."""
    rng = np.random.default_rng(ground.seed)
    base, tint = np.array(_muted(rng), np.float32), np.array(_muted(rng), np.float32)
    frequency = np.hypot(np.fft.fftfreq(px)[:, None], np.fft.rfftfreq(px)[None, :]) * px
    spectrum = np.fft.rfft2(rng.standard_normal((px, px))) / (1 + frequency) ** rng.uniform(1.2, 2.0)
    waves = np.fft.irfft2(spectrum, s=(px, px)).astype(np.float32)
    blend = np.clip(0.5 + waves / (4 * waves.std()), 0, 1)[..., None]
    return np.tile((base + blend * (tint - base)).astype(np.uint8), (2, 2, 1))


@functools.lru_cache(maxsize=16)
def _drifters(ground: Ground) -> tuple[tuple[str, tuple[int, int, int], float, float, float, float, float], ...]:
    """Shape, colour, size, place and speed of the muted shapes."""
    rng = np.random.default_rng((ground.seed, 1))
    made = []
    for _ in range(ground.num_drifters):
        shape, colour, size = str(rng.choice(SHAPES)), _muted(rng), float(rng.uniform(0.15, 0.35))
        (x, y), (vx, vy) = rng.uniform(0, 1.3, 2).tolist(), rng.uniform(-0.15, 0.15, 2).tolist()
        made.append((shape, colour, size, x, y, vx, vy))
    return tuple(made)


@functools.lru_cache(maxsize=8)
def _noise(px: int, level: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-level, level + 1, (2 * px, 2 * px, 3), dtype=np.int16)


def still(card: Card, px: int) -> UInt8[ndarray, "height width 3"]:
    """The card alone, as a picture."""
    return _card(card.content, _shaded(card), card.size, px, card.hint).copy()
