"""Ids and visuals to one row, rows to a `Batch`, a batch to its `DropPlan`. Every decision about place is here.

In: ids with placeholders (-200), labels, and what each placeholder stands for. Out: NumPy leaves of a `Batch`.
Next: hico_jax/batch.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from data_pipeline.chat import IGNORE
from data_pipeline.drop import count_queries, plan_drop, stages
from hico_jax.batch import Batch, Geometry
from hico_jax.shapes import Bool, Float, Int, UInt8, ndarray


class RowTooLongError(ValueError):
    """A row that exceeds its limit."""

    def __init__(self, length: int, visual: int, limit: int) -> None:
        super().__init__(
            f"the row has {length} tokens ({visual} visual, {length - visual} text) but the limit is {limit}; "
            "raise data.max_length, or lower data.max_frames or data.image_grid"
        )
        self.excess = length - limit
        self.frames = 0  # of its longest film, when known


@dataclasses.dataclass(frozen=True)
class Visual:
    """What one film or picture brings to a row."""

    num_clips: int = 0  # of a film
    num_tiles: int = 0  # of a picture
    grid: tuple[int, int] | None = None  # rows, columns of a tiled picture: the global view, then the tiles
    parts: int = 1  # placeholders over which a film is spread (InternVL models write one for each frame)

    @classmethod
    def film(cls, num_frames: int, geometry: Geometry, *, parts: int = 1) -> Visual:
        """A film of so many sampled frames.

        Raises:
          ValueError: the frames do not fill whole clips.
        """
        clips, rest = divmod(num_frames, geometry.frames_per_clip)
        if rest or not clips:
            raise ValueError(
                f"{num_frames} frames do not make whole clips of {geometry.frames_per_clip}; "
                "set data.frame_multiple and data.min_frames to multiples of it"
            )
        return cls(num_clips=clips, parts=parts)

    @classmethod
    def picture(cls, num_tiles: int = 1, grid: tuple[int, int] | None = None) -> Visual:
        """A picture of one tile, or of a global view and `grid` = (rows, columns) of tiles."""
        return cls(num_tiles=num_tiles, grid=grid)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row before padding. Segments are numbered from 1; slots count this row's clips first, then its tiles."""

    tokens: Int[ndarray, " L"]
    slots: Int[ndarray, " L"]
    positions: Int[ndarray, " L"]
    segments: Int[ndarray, " L"]
    labels: Int[ndarray, " L"]  # -100 where nothing is learnt; visual tokens never are
    num_clips: int
    num_tiles: int
    clips: UInt8[ndarray, "N T height width 3"] | None = None
    tiles: UInt8[ndarray, "I height width 3"] | None = None
    held: Bool[ndarray, " _"] | None = None  # which of its clips `clips` are; None: all of them

    def __len__(self) -> int:
        return len(self.tokens)


def row(
    ids: Sequence[int] | ndarray,
    labels: Sequence[int] | ndarray | None,
    visuals: Sequence[Visual],
    geometry: Geometry,
    *,
    max_length: int | None = None,
    truncate: str = "error",
    clips: ndarray | None = None,
    tiles: ndarray | None = None,
) -> Row:
    """Put each visual's tokens where its placeholder stands (`prepare_inputs_labels_for_multimodal`).

    A row longer than `max_length` (None: the model's) is an error, because cutting its end, as the reference does,
    loses the question and the answer. `truncate="reference"` cuts it all the same.

    Raises:
      ValueError: placeholders and visuals do not match, or the row is too long.
    """
    text = np.asarray(ids, np.int64)
    learnt = np.full(len(text), IGNORE, np.int64) if labels is None else np.asarray(labels, np.int64)
    places = np.flatnonzero(text < 0)
    pieces = _pieces(visuals, geometry)
    if len(places) != len(pieces):
        raise ValueError(
            f"the text has {len(places)} <image> placeholders for {len(pieces)} films or pictures; write one for each"
        )
    tokens, slots, full = [], [], []
    start = 0
    for place, piece in zip([*places, len(text)], [*pieces, np.zeros(0, np.int64)], strict=True):
        tokens += [text[start:place], np.zeros(len(piece), np.int64)]
        slots += [np.full(place - start, -1, np.int64), piece]
        full += [learnt[start:place], np.full(len(piece), IGNORE, np.int64)]
        start = place + 1
    limit = geometry.max_length if max_length is None else max_length
    length = sum(map(len, tokens))
    if length > limit and truncate != "reference":
        raise RowTooLongError(length, sum(map(len, pieces)), limit)
    cut = slice(min(length, limit))
    return Row(
        tokens=np.concatenate(tokens)[cut].astype(np.int32),
        slots=np.concatenate(slots)[cut].astype(np.int32),
        positions=np.arange(min(length, limit), dtype=np.int32),
        segments=np.ones(min(length, limit), np.int32),
        labels=np.concatenate(full)[cut].astype(np.int32),
        num_clips=sum(v.num_clips for v in visuals),
        num_tiles=sum(v.num_tiles for v in visuals),
        clips=clips,
        tiles=tiles,
    )


def _pieces(visuals: Sequence[Visual], geometry: Geometry) -> list[ndarray]:
    """The slots that each placeholder stands for, in order."""
    per_clip, per_tile = geometry.tokens_per_clip, geometry.tokens_per_image
    clip, tile = 0, sum(v.num_clips for v in visuals) * per_clip
    pieces: list[ndarray] = []
    for visual in visuals:
        if visual.num_clips:
            count = visual.num_clips * per_clip
            if count % visual.parts:
                raise ValueError(f"{count} visual tokens cannot be spread evenly over {visual.parts} placeholders")
            pieces += np.split(clip + np.arange(count), visual.parts)
            clip += count
        else:
            pieces.append(tile + tile_order(visual, per_tile))
            tile += visual.num_tiles * per_tile
    return pieces


def tile_order(visual: Visual, tokens_per_tile: int) -> Int[ndarray, " S"]:
    """In which order a picture's tokens stand: the global view, then the raster order of the joined tiles.

    A tile's merged tokens have no place in it, yet the reference lays them out as a square and reads the joined
    squares row by row, so the order must be kept.

    Raises:
      ValueError: the grid does not fit the tiles, or a tile's tokens are no square.

    Example:
      >>> tile_order(Visual.picture(3, (1, 2)), 4).tolist()
      [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]
    """
    order = np.arange(visual.num_tiles * tokens_per_tile)
    if visual.grid is None:
        return order
    rows, cols = visual.grid
    side = round(tokens_per_tile**0.5)
    if rows * cols + 1 != visual.num_tiles or side * side != tokens_per_tile:
        raise ValueError(
            f"a grid of {rows}x{cols} tiles of {tokens_per_tile} tokens does not fit {visual.num_tiles} tiles; "
            "give the global view and rows * columns tiles, with a square number of tokens"
        )
    tiles = order[tokens_per_tile:].reshape(rows, cols, side, side)
    return np.concatenate([order[:tokens_per_tile], tiles.transpose(0, 2, 1, 3).ravel()])


def pack(rows: Sequence[Row], geometry: Geometry) -> Row:
    """Several conversations in one row: attention stays inside each, positions start again."""
    if len(rows) == 1:
        return rows[0]
    total_clips = sum(r.num_clips for r in rows)
    slots, segments, clip, tile, segment = [], [], 0, 0, 0
    for r in rows:
        slots.append(_shift(r, geometry, total_clips, clip, tile))
        segments.append(np.where(r.segments > 0, r.segments + segment, 0).astype(np.int32))
        clip, tile, segment = clip + r.num_clips, tile + r.num_tiles, segment + int(r.segments.max(initial=0))
    return Row(
        tokens=np.concatenate([r.tokens for r in rows]),
        slots=np.concatenate(slots),
        positions=np.concatenate([r.positions for r in rows]),
        segments=np.concatenate(segments),
        labels=np.concatenate([r.labels for r in rows]),
        num_clips=clip,
        num_tiles=tile,
        clips=_join([r.clips for r in rows]),
        tiles=_join([r.tiles for r in rows]),
        held=_join([r.held for r in rows]),
    )


def _shift(r: Row, geometry: Geometry, total_clips: int, clips_before: int = 0, tiles_before: int = 0) -> ndarray:
    """The row's slots when it is part of a row of `total_clips` clips, after so many others."""
    per_clip, per_tile = geometry.tokens_per_clip, geometry.tokens_per_image
    of_tile = (total_clips - r.num_clips) * per_clip + tiles_before * per_tile
    moved = r.slots + np.where(r.slots >= r.num_clips * per_clip, of_tile, clips_before * per_clip)
    return np.where(r.slots >= 0, moved, -1).astype(np.int32)


def _join(arrays: Sequence[ndarray | None]) -> ndarray | None:
    present = [a for a in arrays if a is not None]
    return np.concatenate(present) if present else None


def blank(r: Row, held: Bool[ndarray, " N"], geometry: Geometry) -> Row:
    """The row with nothing to see in the clips that are `held` here."""
    px = geometry.image_px
    clips = np.zeros((int(held.sum()), geometry.frames_per_clip, px, px, 3), np.uint8)
    return dataclasses.replace(r, clips=clips, held=held)


def skip_positions(r: Row, reach: int, rng: np.random.Generator) -> Row:
    """Let the positions jump: by `a` from the start of the row, by `b >= a` from a random place on, both up to `reach`.

    A short row then trains the distances of a long film (`use_pos_skipping` in the reference, which draws once for
    a micro-batch of one).
    """
    place = int(rng.integers(len(r) + 1))
    first = int(rng.integers(reach + 1))
    second = int(rng.integers(first, reach + 1))
    jump = np.where(np.arange(len(r)) < place, first, second).astype(np.int32)
    return dataclasses.replace(r, positions=r.positions + jump)


def targets(r: Row) -> tuple[Int[ndarray, " L"], Float[ndarray, " L"]]:
    """What each position predicts, and its weight: the next label of its segment, 0 where there is none.

    A run of visual tokens predicts what comes after it from every place, because dropping may leave any of them last;
    so does the text token before it, because dropping may leave none. The model trains only the last one alive.
    """
    length = len(r)
    following = np.full(length, IGNORE, np.int32)
    same = r.segments[1:] == r.segments[:-1]
    following[:-1] = np.where(same & (r.segments[1:] > 0), r.labels[1:], IGNORE)
    ends = np.flatnonzero((r.slots < 0) | np.append((r.slots[1:] < 0) | ~same, True))  # text, and the last of a run
    following = following[ends[np.searchsorted(ends, np.arange(length))]] if length else following
    (before,) = np.nonzero((r.slots[:-1] < 0) & (r.slots[1:] >= 0) & same & (r.segments[1:] > 0))
    following[before] = following[before + 1]
    learnt = following != IGNORE
    return np.where(learnt, following, 0).astype(np.int32), learnt.astype(np.float32)


def collate(
    rows: Sequence[Row],
    geometry: Geometry,
    length: int | None = None,
    num_clips: int | None = None,
    num_tiles: int | None = None,
    *,
    training: bool = True,
    pixels: bool = True,
    drop_multiple: int = 1,
    sizes: Sizes | None = None,
) -> Batch:
    """Pad rows on the right to one shape; None takes the largest of these rows, and of `sizes`.

    Without `pixels` the batch has none (N = I = 0), for callers that hold the visual tokens already; its slots
    still count `num_clips`. With a drop schedule in the geometry the batch carries its plan.

    Raises:
      ValueError: a row does not fit the shape.
    """
    own = functools.reduce(Sizes.union, (measure(r, geometry, training=training) for r in rows), sizes or Sizes())
    length = own.length if length is None else length
    num_clips = own.clips if num_clips is None else num_clips
    num_tiles = own.tiles if num_tiles is None else num_tiles
    for name, has, most in (
        ("tokens", own.length, length), ("clips", own.clips, num_clips), ("image tiles", own.tiles, num_tiles),
    ):  # fmt: skip
        if has > most:
            raise ValueError(
                f"a row has {has} {name} but the batch has room for {most}; raise the buckets or the limits"
            )
    shape = (len(rows), length)
    tokens, positions, segments, answers = (np.zeros(shape, np.int32) for _ in range(4))
    slots, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    labelled = np.zeros(shape, bool)
    for b, r in enumerate(rows):
        at = slice(len(r))
        tokens[b, at], positions[b, at], segments[b, at] = r.tokens, r.positions, r.segments
        answers[b, at], weights[b, at] = targets(r)
        slots[b, at] = _shift(r, geometry, num_clips)
        labelled[b, at] = r.labels != IGNORE
    px, frames = geometry.image_px, geometry.frames_per_clip
    batch = Batch(
        tokens=tokens,
        slots=slots,
        positions=positions,
        segments=segments,
        targets=answers,
        weights=weights,
        clips=_pixels([r.clips for r in rows], num_clips if pixels else 0, (frames, px, px, 3), [r.held for r in rows]),
        images=_pixels([r.tiles for r in rows], num_tiles if pixels else 0, (px, px, 3)),
    )
    if not geometry.drop.num_stages:
        return batch
    plan = plan_drop(
        batch, geometry.drop, labelled=labelled, training=training, multiple=drop_multiple,
        lengths=own.kept, num_queries=own.queries, num_segments=own.segments,
    )  # fmt: skip
    return batch.replace(drop=plan)  # type: ignore[attr-defined]


def _pixels(
    arrays: Sequence[ndarray | None], count: int, shape: tuple[int, ...], held: Sequence[ndarray | None] | None = None
) -> UInt8[ndarray, "B N *shape"]:
    out = np.zeros((len(arrays), count, *shape), np.uint8)  # what is not written takes no memory
    for b, array in enumerate(arrays):
        if array is None or not count:
            continue
        some = None if held is None else held[b]
        if some is None:
            out[b, : len(array)] = array
        else:
            out[b, np.flatnonzero(some)] = array
    return out


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a row asks of its batch; `union` is what several do."""

    length: int = 0
    clips: int = 0
    tiles: int = 0
    kept: tuple[int, ...] = ()  # row length after each stage of compression
    queries: int = 0
    segments: int = 0

    def union(self, other: Sizes) -> Sizes:
        """The least sizes that hold both."""
        pairs = zip(self.kept, other.kept, strict=True) if self.kept and other.kept else ()
        return Sizes(
            max(self.length, other.length),
            max(self.clips, other.clips),
            max(self.tiles, other.tiles),
            tuple(max(p) for p in pairs) or self.kept or other.kept,
            max(self.queries, other.queries),
            max(self.segments, other.segments),
        )


def measure(r: Row, geometry: Geometry, *, training: bool = True) -> Sizes:
    """The sizes of one row."""
    kept, queries = np.zeros(geometry.drop.num_stages, np.int64), 0
    if geometry.drop.num_stages:
        kept += int((r.slots < 0).sum())
        for segment in range(1, int(r.segments.max(initial=0)) + 1):
            mine = r.segments == segment
            asks = count_queries(r.labels[mine] != IGNORE)
            kept += stages(int((r.slots[mine] >= 0).sum()), geometry.drop, asks > 0 or not training)[0]
            queries += asks
    return Sizes(len(r), r.num_clips, r.num_tiles, tuple(kept.tolist()), queries, int(r.segments.max(initial=0)))
