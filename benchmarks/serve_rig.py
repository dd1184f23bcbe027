"""A server in this process for `serve_soak.py` and `serve_fuzz.py`, with a tiny random model unless a folder is named.

In: a folder to work in, limits. Out: a running server and its address.
Next: benchmarks/serve_soak.py
"""

from __future__ import annotations

import io
import os
import pathlib
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import uvicorn
from flax import nnx
from PIL import Image

from data_pipeline import video
from data_pipeline.frames import Sampling
from data_pipeline.tokenizer import train_bpe
from data_pipeline.world.texts import corpus
from hico_jax import registry
from hico_jax.api import Model
from hico_jax.film import Viewer
from hico_jax.serve import app, media
from hico_jax.serve.decoder import Limits
from hico_jax.serve.engine import Engine
from hico_jax.serve.timed import Timed
from hico_jax.serve.warming import Warming


def tiny() -> Model:
    """A random model that answers in milliseconds, with weights so large that answers depend on what is seen."""
    words, rng = train_bpe(corpus(), 400), np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: registry.model_config("nano").build(rngs=nnx.Rngs(0))))

    def value(keys: Any, leaf: Any) -> Any:
        norm = any(getattr(key, "key", None) == "scale" for key in keys)
        return jnp.ones(leaf.shape) if norm else jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32)

    hico = nnx.merge(graph, jax.tree_util.tree_map_with_path(value, state))
    model = Model(hico)
    viewer = Viewer(hico, words, sampling=Sampling("dynamic_fps1", 8, 512, 4), clips_per_step=2)
    model.__dict__ |= {"tokenizer": words, "viewer": viewer}
    return model


def films(folder: pathlib.Path) -> dict[str, bytes]:
    """The same three seconds of colours in every container; of a picture in two."""
    import av

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    made = {"mp4": video.write_video(folder / "a.mp4", frames, 4.0).read_bytes()}
    (folder / "a.mp4").unlink()
    for name, codec in (("matroska", "libx264"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")):
        data = io.BytesIO()
        with av.open(data, "w", format=name) as out:
            stream = out.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
        made[name] = data.getvalue()
    pictures = [Image.fromarray(f) for f in frames]
    for name in ("gif", "png", "jpeg"):
        data = io.BytesIO()
        more: dict[str, Any] = {"save_all": True, "append_images": pictures[1:]} if name == "gif" else {}
        pictures[0].save(data, format=name, **more)
        made[name] = data.getvalue()
    return made


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, cut, doubled, moved or put in."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(out))) if len(out) else 0
        kind, size = int(rng.integers(6)), int(rng.integers(1, 64))
        if kind == 0:
            out[at : at + size] = rng.bytes(len(out[at : at + size]))
        elif kind == 1 and out:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del out[at : at + size * 8]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at : at + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**24])).to_bytes(4, "big")
        elif rng.random() < 0.2:
            del out[at:]
    return bytes(out)


class Rig:
    """A running server; `close` ends it."""

    def __init__(
        self, model: Model, work: pathlib.Path, *, buckets: tuple[tuple[int, int], ...], piece: int = 256,
        queue: int = 64, limits: Limits | None = None, warm: bool = True, file_bytes: int = 64 << 20, **options: Any,
    ) -> None:  # fmt: skip
        self.model, self.work = model, work
        self.engine = Engine(model.hico, model.tokenizer, buckets=buckets, piece=piece, queue=queue)
        if warm:
            warming = Warming(self.engine, model)
            warming.begin()
            warming.finish()
        self.engine.start()
        allowance = media.Allowance(file_bytes=file_bytes)
        self.store = media.Store(work, model, self.engine.call, limits=limits or Limits(), allowance=allowance)
        self.server = uvicorn.Server(
            uvicorn.Config(
                app.Server(model, self.engine, self.store, app.Options(**options)).app(), port=0,
                log_level="error", log_config=None, http=Timed, ws="none", lifespan="off",
            )
        )  # fmt: skip
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def settled(self, seconds: float = 20.0) -> bool:
        """Whether nothing is left to do in the engine, nobody holds a lane and no film is being read."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            lanes = [lane for pool in self.engine.pools for lane in pool.lanes]
            if self.engine.idle and not self.store.under_way and not any(lane.busy for lane in lanes):
                return True
            time.sleep(0.05)
        return False

    def close(self) -> None:
        """Stop listening, then the engine, then remove what was sent."""
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.close()
        self.store.close()


def rss_mib() -> float:
    """Memory of this process now."""
    text = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(text.split("VmRSS:")[1].split()[0]) / 1024, 1)


def descriptors() -> int:
    """Open files and sockets of this process."""
    return len(os.listdir("/proc/self/fd"))
