"""A model from Python: everything `hico ask` does, and the numbers behind it.

    import hico_jax

    model = hico_jax.load("weights/VideoChat-Flash-Qwen2-7B_res448")
    film = model.watch("film.mp4", max_frames=256)
    print(model.ask(film, "What happens at the end?").text)
    talk = model.chat(film)
    print(talk.say("Who is there?").text)
    print(talk.say("When do they leave?").text)
    print(talk.say("Is it the man in this picture?", images=["a.jpg"]).text)
    print(model.ask(None, "Describe both.", images=["a.jpg", "b.jpg"]).text)
    print(model.count_tokens("How long is this?"), film.num_clips * model.geometry.tokens_per_clip)

In: a folder of released, exported or converted weights, or the workdir of a run. Out: answers, token ids, logits.
Next: hico_jax/film.py
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from data_pipeline import chat, image, layout
from data_pipeline.frames import time_message
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from hico_jax import ask, film, generate, weights
from hico_jax import quantize as packing
from hico_jax.batch import Batch, DropSchedule
from hico_jax.convert import load as released
from hico_jax.film import Answer, Film, Viewer
from hico_jax.generate import GenerationConfig
from hico_jax.models.hico import HiCo
from hico_jax.shapes import Array, Float, Int, ndarray

Compress = tuple[str, Sequence[int], Sequence[float]]  # kind, layers, ratios of `batch.DropSchedule`
Seen = tuple[ndarray, str, tuple[int, int] | None]  # pixels [T 3 S S], "video" or "image", (width, height)
CLIPS_AT_ONCE = 16
PAD = 64  # rows are padded to multiples of this, so that rows of about one length share a compilation


def load(
    folder: str | os.PathLike[str],
    dtype: Any = None,
    *,
    mesh: Mesh | None = None,
    tokens_per_frame: int | None = None,
    quantize: str | None = None,
) -> Model:
    """Read a model: a folder, or the name of a shipped one (`load("nano")`).

    Args:
      dtype: "float32" or "bfloat16" (or the JAX type), of parameters and activations; None keeps what the folder says,
        except on a CPU (`ask.usual_dtype`).
      mesh: where to put the parameters; None is the default device.
      tokens_per_frame: 16 or 64 for an InternVL HiCo model whose folder does not say R16 or R64.
      quantize: "int8" holds the language model's weights in 8 bits: decoding reads half the bytes.

    Raises:
      ValueError: the folder holds no model, a damaged one, or one that is not supported; int8 with a mesh.
    """
    try:
        dtype = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        dtype = str(dtype)
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; it must be 'float32', 'bfloat16' or None")
    folder = weights.find(folder)
    model, tokenizer_folder = ask.load_model(folder, dtype, mesh=mesh)
    raw = released.read_config(folder)
    if tokens_per_frame is not None:
        model = _reshaped(
            model, compressor=dataclasses.replace(model.config.compressor, tokens_per_frame=tokens_per_frame)
        )
    if quantize is not None:
        if mesh is not None:
            raise ValueError(
                f"quantize is {quantize!r} with a mesh; packed weights lie on one device, leave out the mesh"
            )
        model = packing.quantized(model, quantize)
    return Model(model, tokenizer_folder, eos=_eos(folder, raw.get("released", raw)))


class Model:
    """A whole model with its tokenizer. `load` makes one; `hico` holds the parameters."""

    def __init__(self, hico: HiCo, folder: str | os.PathLike[str] | None = None, *, eos: Sequence[int] = ()) -> None:
        self.hico, self.folder, self.eos = hico, folder, tuple(eos)
        self.geometry = hico.config.geometry()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the model's folder.

        Raises:
          ValueError: there is none, or it knows more tokens than the model.
        """
        if self.folder is None:
            raise ValueError("this model was made without a folder, so it has no tokenizer")
        found = load_tokenizer(self.folder)
        check_vocabulary(found.vocab_size, self.hico.config.llm.vocab_size, os.fspath(self.folder))
        return found

    @functools.cached_property
    def viewer(self) -> Viewer:
        """What watches films for this model."""
        return Viewer(self.hico, self.tokenizer, sampling=ask.whole_clips(film.INFERENCE, self.hico))

    def watch(
        self,
        path: str | os.PathLike[str],
        *,
        max_frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
        reader: str | None = None,
    ) -> Film:
        """Read and encode a film once; ask about it as often as you like."""
        viewer = self.viewer
        if max_frames is not None:
            sampling = dataclasses.replace(
                film.INFERENCE, max_frames=max_frames, min_frames=min(film.INFERENCE.min_frames, max_frames)
            )
            viewer = Viewer(self.hico, self.tokenizer, sampling=ask.whole_clips(sampling, self.hico))
        return viewer.watch(path, start=start, end=end, reader=reader)

    def look(self, images: Sequence[str | os.PathLike[str] | Image.Image]) -> Pictures:
        """Encode images once, as `watch` does a film; ask about them as often as you like.

        One image is cut into tiles, several are padded to squares, as in training.

        Raises:
          ValueError: a model that has never seen an image.
        """
        seen = self.see_images(images)
        tiles = np.concatenate([np.moveaxis(pixels, 1, -1) for pixels, _, _ in seen])
        return Pictures(tuple(self._describe(one) for one in seen), _in_chunks(self.hico, tiles, "images"))

    def ask(
        self,
        seen: Film | Pictures | str | os.PathLike[str] | None,
        question: str,
        *,
        images: Sequence[str | os.PathLike[str] | Image.Image] = (),
        history: Sequence[Mapping[str, Any]] = (),
        settings: GenerationConfig | None = None,
    ) -> Answer:
        """Answer a question about a film, about images, about both, or about nothing.

        `history` holds earlier turns as role and content; what is seen belongs to the first turn, and a later one may
        bring more under `seen` (a tuple of what `watch` and `look` give).

        Raises:
          ValueError: images for a model that has never seen one.
        """
        turns = [dict(turn) for turn in (*history, {"role": "user", "content": question})]
        seen = self.watch(seen) if isinstance(seen, str | os.PathLike) else seen
        first = (*(() if seen is None else (seen,)), *((self.look(images),) if images else ()))
        turns[0]["seen"] = (*first, *turns[0].get("seen", ()))
        return self._reply(turns, settings)

    def chat(
        self, seen: Film | Pictures | str | os.PathLike[str] | None = None, *, settings: GenerationConfig | None = None
    ) -> Chat:
        """A talk of several turns; what is seen is encoded once, and every turn may bring images."""
        seen = self.watch(seen) if isinstance(seen, str | os.PathLike) else seen
        return Chat(self, seen, settings)

    def count_tokens(self, text: str) -> int:
        """How many ids a text has."""
        return len(self.tokenizer.encode(text))

    def see_images(self, images: Sequence[str | os.PathLike[str] | Image.Image]) -> list[Seen]:
        """Images as `logits` and `generate_ids` take them."""
        pictures = [i.convert("RGB") if isinstance(i, Image.Image) else image.read_image(i) for i in images]
        cut = image.picture_tiles(pictures, self.geometry.image_px)
        return [
            (np.moveaxis(image.normalize(tiles), -1, 1), "image", picture.size)
            for picture, (tiles, _) in zip(pictures, cut, strict=True)
        ]

    def logits(
        self, ids: Sequence[int] | ndarray, visuals: Sequence[Seen] = (), compress: Compress | None = None
    ) -> Float[ndarray, "L V"]:
        """Float32 logits of every token that is alive after the last layer, visual ones among them.

        Args:
          ids: token ids with -200 in the place of each visual (a video may also have one in each frame's place).
          visuals: pixels float32 [T, 3, S, S], already normalized; "video" or "image" (tiles on the first axis);
            the (width, height) of an image before it was cut, which an image of several tiles needs.
          compress: kind, layers and ratios of video-level compression; None: as the checkpoint says.

        Raises:
          ValueError: visuals that do not fit the ids, or pixels of a shape that the model does not take.
        """
        model = self._compressing(compress)
        with _exact(model):
            batch, visual = self._prompt(model, ids, visuals)
            logits, real = _logits(model, batch, visual)
        return np.asarray(logits[0])[: int(real[0])]

    def generate_ids(
        self,
        ids: Sequence[int] | ndarray,
        visuals: Sequence[Seen] = (),
        max_new_tokens: int = 512,
        compress: Compress | None = None,
    ) -> list[int]:
        """The likeliest continuation, token by token: greedy, no penalty. Arguments as in `logits`.

        It ends after an end token of the folder's `generation_config.json` (of `config.json`, where that file is
        absent), which is among the ids.
        """
        model = self._compressing(compress)
        config = GenerationConfig(max_new_tokens=max_new_tokens, eos=self.eos)
        with _exact(model):
            made = generate.generate(model, self._prompt(model, ids, visuals), config)
        return made.ids[0, : made.lengths[0]].tolist()

    def row(self, turns: Sequence[Mapping[str, Any]]) -> tuple[layout.Row, list[Film | Pictures]]:
        """The prompt of a talk, and everything seen in it in the order of its placeholders.

        Raises:
          ValueError: media that the model does not take there, or a row that is too long.
        """
        brought = [turn.get("seen", ()) for turn in turns]
        told = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        if not any(brought[1:]) and all(isinstance(one, Film) for one in brought[0]) and len(brought[0]) < 2:
            film = brought[0][0] if brought[0] else None
            return self.viewer.row(film, told[-1]["content"], told[:-1]), list(brought[0])
        if self.hico.config.projector == "norm_mlp":
            raise ValueError("the InternVL HiCo models take one film in the first turn; ask about each film alone")
        for turn, media in zip(told, brought, strict=True):
            if media:
                times = [time_message(f.duration_s, f.indices, f.fps) for f in media if isinstance(f, Film)]
                count = sum(1 if isinstance(one, Film) else len(one.visuals) for one in media)
                turn["content"] = chat.first_question(turn["content"], " ".join(map(str.strip, times)), count)
        ids = chat.prompt_ids(self.tokenizer, told)
        seen = [one for media in brought for one in media]
        visuals = [
            v
            for one in seen
            for v in ([layout.Visual(num_clips=one.num_clips)] if isinstance(one, Film) else one.visuals)
        ]
        return layout.row(ids, None, visuals, self.geometry), seen

    def _reply(self, turns: Sequence[Mapping[str, Any]], settings: GenerationConfig | None) -> Answer:
        """The answer to the last turn, each turn with what it brings under `seen`."""
        settings = settings or GenerationConfig(eos=self.tokenizer.eos_ids)
        row, media = self.row(turns)
        if (
            len(media) < 2
            and all(isinstance(one, Film) for one in turns[0].get("seen", ()))
            and not any(turn.get("seen") for turn in turns[1:])
        ):
            told = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
            (film,) = [one for one in media if isinstance(one, Film)] or (None,)  # of one size for many questions
            return self.viewer.ask(film, told[-1]["content"], history=told[:-1], config=settings)
        batch, visual = self._seen(row, media)
        began = time.perf_counter()
        made = generate.generate(self.hico, (batch, visual), settings)
        seconds = time.perf_counter() - began
        said = made.ids[0, : made.lengths[0]].tolist()
        count = int((np.asarray(batch.slots) >= 0).sum())
        text = chat.clean_answer(self.tokenizer, said)
        tokens = int((np.asarray(batch.segments) > 0).sum())
        return Answer(text, tuple(said), tokens, count, self.geometry.drop.kept(count), seconds)

    def _seen(self, row: layout.Row, media: Sequence[Film | Pictures]) -> tuple[Batch, Float[Array, "1 S D"]]:
        """The batch of one talk, and the visual tokens of everything seen in it: films first, then pictures."""
        films = [one for one in media if isinstance(one, Film)]
        parts = [f.visual[:, : f.num_clips * self.geometry.tokens_per_clip] for f in films]
        parts += [one.visual for one in media if isinstance(one, Pictures)]
        length = min(-(-len(row) // PAD) * PAD, self.geometry.max_length)
        batch = layout.collate([row], self.geometry, length, training=False, pixels=False, drop_multiple=32)
        return batch, jnp.concatenate(parts, axis=1)

    def _compressing(self, compress: Compress | None) -> HiCo:
        if compress is None:
            return self.hico
        kind, layers, ratios = compress
        schedule = DropSchedule(kind, tuple(int(n) for n in layers), tuple(float(r) for r in ratios))
        return self.hico if schedule == self.hico.config.drop else ask.with_drop(self.hico, schedule)

    def _prompt(
        self, model: HiCo, ids: Sequence[int] | ndarray, visuals: Sequence[Seen]
    ) -> tuple[Batch, Float[Array, "1 S D"]]:
        geometry = model.config.geometry()
        ids = np.asarray(ids, np.int64).reshape(-1)
        places = int((ids < 0).sum())
        visuals = visuals if places else ()  # a text may carry a dummy image, as the reference's batches do
        if self.hico.config.projector == "norm_mlp" and all(len(pixels) == 1 for pixels, _, _ in visuals) and visuals:
            visuals = [(np.concatenate([pixels for pixels, _, _ in visuals]), "video", None)]  # frames one by one
        described = [self._describe(seen) for seen in visuals]
        if len(described) != places:  # a place for each frame, or for each token
            described = _spread(described, places, geometry.frames_per_clip, geometry.tokens_per_clip)
        limit = len(ids) + sum(len(v[0]) for v in visuals) * geometry.tokens_per_image + geometry.max_length
        whole = self.hico.config.llm.arch == "internlm2"  # its reference has no limit
        row = layout.row(ids, None, described, geometry, max_length=limit if whole else None)
        length = -(-len(row) // PAD) * PAD
        batch = layout.collate([row], geometry, length, training=False, pixels=False)
        films = [np.moveaxis(np.asarray(p, np.float32), 1, -1) for p, kind, _ in visuals if kind == "video"]
        tiles = [np.moveaxis(np.asarray(p, np.float32), 1, -1) for p, kind, _ in visuals if kind == "image"]
        clips = [f.reshape(-1, geometry.frames_per_clip, *f.shape[1:]) for f in films]
        parts = [_in_chunks(model, np.concatenate(clips), "clips")] if clips else []
        parts += [_in_chunks(model, np.concatenate(tiles), "images")] if tiles else []
        blank = jnp.zeros((1, 0, model.config.llm.embed_dim), jnp.dtype(model.config.dtype))
        return batch, jnp.concatenate([blank, *parts], axis=1)

    def _describe(self, seen: Seen) -> layout.Visual:
        pixels, kind, size = seen
        px = self.geometry.image_px
        if np.ndim(pixels) != 4 or np.shape(pixels)[1] != 3:
            raise ValueError(f"pixels have shape {np.shape(pixels)}; give [frames or tiles, 3, {px}, {px}]")
        if kind == "video":
            return layout.Visual.film(len(pixels), self.geometry)
        if kind != "image":
            raise ValueError(f"a visual is {kind!r}; it must be 'video' or 'image'")
        if self.hico.config.projector == "norm_mlp":
            raise ValueError("the InternVL HiCo models take videos only; give the image four times as a video")
        if len(pixels) == 1:
            return layout.Visual.picture(1)
        if size is None:
            raise ValueError(f"an image of {len(pixels)} tiles comes without its size; give (width, height)")
        across, down = image.grid_shape((int(size[0]), int(size[1])), px)
        return layout.Visual.picture(len(pixels), (down, across))


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images that were looked at: where their tokens stand, and the tokens on the device."""

    visuals: tuple[layout.Visual, ...]
    visual: Float[Array, "1 S D"]
    uid: int = dataclasses.field(default_factory=film.UIDS.__next__)  # tells equal-looking media apart


class Chat:
    """Several turns about what is seen. A question that fails leaves the talk as it was."""

    def __init__(self, model: Model, seen: Film | Pictures | None, settings: GenerationConfig | None = None) -> None:
        self.model, self.seen, self.settings = model, seen, settings
        self.history: list[dict[str, Any]] = []

    def say(self, question: str, *, images: Sequence[str | os.PathLike[str] | Image.Image] = ()) -> Answer:
        """The next turn's answer; `images` join the talk in this turn."""
        turn: dict[str, Any] = {"role": "user", "content": question}
        if images:
            turn["seen"] = (self.model.look(images),)
        turns = [dict(told) for told in (*self.history, turn)]
        if self.seen is not None:
            turns[0]["seen"] = (self.seen, *turns[0].get("seen", ()))
        answer = self.model._reply(turns, self.settings)
        self.history += [turn, {"role": "assistant", "content": answer.text}]
        return answer


def check_vocabulary(tokenizer: int, model: int, where: str) -> None:
    """A tokenizer that knows more tokens than the model has rows would read past its embedding.

    Raises:
      ValueError: so it is.
    """
    if tokenizer > model:
        raise ValueError(
            f"the tokenizer of {where} has {tokenizer} tokens but the model has rows for {model}; "
            "take the tokenizer that the weights were released with"
        )


def _spread(visuals: list[layout.Visual], places: int, frames: int, tokens: int) -> list[layout.Visual]:
    """Films over several placeholders: one for each of their frames, or for each of their tokens."""
    for per_clip in (frames, tokens):
        if places == sum(v.num_clips * per_clip or 1 for v in visuals):
            return [dataclasses.replace(v, parts=v.num_clips * per_clip) if v.num_clips else v for v in visuals]
    return visuals  # `layout.row` says what is wrong


@jax.jit
def _logits(model: HiCo, batch: Batch, visual: Array) -> tuple[Float[Array, "B L V"], Int[Array, " B"]]:
    stream, _ = model.llm(model.splice(batch, visual), batch.drop, schedule=model.config.drop)
    return generate.logits_of(model.llm, stream.x), (stream.segments > 0).sum(1)


def _in_chunks(model: HiCo, pixels: ndarray, kind: str) -> Float[Array, "1 S D"]:
    """Visual tokens of clips or tiles, a few at a time; the last chunk is padded and cut again."""
    step = min(CLIPS_AT_ONCE, len(pixels))
    frames, side = model.config.vision.frames_per_clip, pixels.shape[-3:]
    parts, per = [], 0
    for first in range(0, len(pixels), step):
        chunk = pixels[first : first + step]
        real = len(chunk)
        chunk = np.concatenate([chunk, np.zeros((step - real, *chunk.shape[1:]), np.float32)])[None]
        none = np.zeros((1, 0, frames, *side) if kind == "images" else (1, 0, *side), np.float32)
        encoded = film.encode(model, none, chunk) if kind == "images" else film.encode(model, chunk, none)
        per = encoded.shape[1] // step
        parts.append(encoded[:, : real * per])
    return jnp.concatenate(parts, axis=1)


def _exact(model: HiCo) -> Any:
    """Full float32 products for a float32 model: who asks for numbers wants them exact."""
    return jax.default_matmul_precision("highest" if model.config.dtype == "float32" else "default")


def _reshaped(model: HiCo, **changes: Any) -> HiCo:
    return ask.with_config(model, dataclasses.replace(model.config, **changes))


def _eos(folder: pathlib.Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else raw
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    eos = found.get("eos_token_id")
    return () if eos is None else tuple(int(i) for i in (eos if isinstance(eos, list) else [eos]))
