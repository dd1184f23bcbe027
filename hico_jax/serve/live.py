"""A film that is still being shot: frames join an open session as they come, and questions are asked at any moment.

    talk = Live(model, fps=1.0, max_frames=3600, policy="thin")
    for frame in camera:                     # uint8 [height, width, 3]
        talk.append(frame[None])
    print(talk.ask("Is somebody there?").text)

Frames become visual tokens clip by clip, so what was seen is never encoded again; a question runs the clips that are
new since the last one (all of them where the model's drop depends on how many there are). Memory is bounded by
`max_frames`, and `policy` says what happens then.
In: frames. Out: `Reply`s.
Next: hico_jax/serve/session.py
"""

from __future__ import annotations

import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from data_pipeline.image import resize
from hico_jax.api import Model
from hico_jax.film import UIDS, Film
from hico_jax.serve.session import Session
from hico_jax.shapes import UInt8, ndarray

POLICIES = ("stop", "oldest", "thin")


class Live(Session):
    """A session whose only film grows.

    Args:
      fps: frames a second that come in, for the sentence about time.
      max_frames: most frames that are remembered; rounded down to whole clips.
      policy: when so many are remembered: "stop" ignores what follows, "oldest" forgets the first quarter, "thin"
        forgets every second clip and from then on takes clips half as often. After forgetting, what is left runs again
        at the next question; it happens so seldom that a frame is run a few times at most.

    Raises:
      ValueError: an unknown policy, or not room for two clips.
    """

    def __init__(
        self, model: Model, *, fps: float = 1.0, max_frames: int = 512, policy: str = "thin", **options: Any
    ) -> None:
        super().__init__(model, **options)
        geometry = model.geometry
        self.most = max_frames // geometry.frames_per_clip
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(POLICIES)}")
        if self.most < 2:
            raise ValueError(f"max_frames is {max_frames}; give at least two clips, {2 * geometry.frames_per_clip}")
        if self.most * geometry.tokens_per_clip >= geometry.max_length:
            room = (geometry.max_length - 1) // geometry.tokens_per_clip * geometry.frames_per_clip
            raise ValueError(f"max_frames is {max_frames}, but the model has room for {room}")
        self.fps, self.policy = fps, policy
        self.clips: list[int] = []  # which clips of the stream are remembered
        self.come = 0  # clips that came
        self.stride = 1  # one clip in so many is taken
        self.encode_s = 0.0
        self.pending: list[ndarray] = []
        self.uid = next(UIDS)
        width, dtype = model.hico.config.llm.embed_dim, jnp.dtype(model.hico.config.dtype)
        self.visual = jnp.zeros((1, self.most * geometry.tokens_per_clip, width), dtype)

    def append(self, frames: UInt8[ndarray, "T height width 3"]) -> int:
        """Take frames in; how many clips joined. A clip joins when its last frame has come."""
        px, per_clip = self.model.geometry.image_px, self.model.geometry.frames_per_clip
        joined = 0
        for frame in frames:
            self.pending.append(resize(frame, px, px))
            if len(self.pending) == per_clip:
                joined += self._join(np.stack(self.pending))
                self.pending = []
        if joined:
            self.media = [self.film()]
        return joined

    def film(self) -> Film:
        """What is remembered."""
        geometry = self.model.geometry
        per_clip, step = geometry.frames_per_clip, geometry.frames_per_clip / self.fps
        indices = (np.array(self.clips)[:, None] * per_clip + np.arange(per_clip)).ravel()
        first = self.clips[0] if self.policy == "oldest" else 0
        duration = (self.come - first if self.policy != "stop" else len(self.clips)) * step
        return Film("live", self.visual, indices, self.fps, duration, len(self.clips), 0.0, self.encode_s, self.uid)

    def _join(self, clip: UInt8[ndarray, "T height width 3"]) -> bool:
        number, self.come = self.come, self.come + 1
        if number % self.stride:
            return False
        if len(self.clips) == self.most:
            if self.policy == "stop":
                return False
            self._forget()
            if number % self.stride:
                return False
        began, per = time.perf_counter(), self.model.geometry.tokens_per_clip
        tokens = self.model.viewer._encode(clip)
        at = len(self.clips) * per
        self.visual = self.visual.at[:, at : at + per].set(tokens)
        self.clips.append(number)
        self.encode_s += time.perf_counter() - began
        return True

    def _forget(self) -> None:
        places = np.arange(len(self.clips))
        if self.policy == "oldest":
            kept = places[max(1, self.most // 4) :]
        else:
            kept, self.stride = places[::2], self.stride * 2
        tokens = self.visual.reshape(1, self.most, -1, self.visual.shape[-1])[:, kept]
        tokens = tokens.reshape(1, -1, self.visual.shape[-1])
        self.visual = jnp.zeros_like(self.visual).at[:, : tokens.shape[1]].set(tokens)
        self.clips = [self.clips[i] for i in kept]
        self.uid = next(UIDS)  # it is another film now
