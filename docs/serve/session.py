"""A session from the first frame to a reopened file; cells begin with `# %%`."""

# %% [markdown]
# A session from the first frame to a reopened file. Run it as a script, or cell by cell in an editor that knows `# %%`.
#
#     python docs/serve/session.py nano film.mp4

# %%
import sys
import tempfile
import time

import hico_jax
from hico_jax.serve.session import Session

folder, film = sys.argv[1:3] if len(sys.argv) > 2 else ("nano", "runs/nano/film.mp4")  # of `bash launch/demo.sh`
model = hico_jax.load(folder)

# %% [markdown]
# Opening reads and encodes the film, a few clips at a time. `prepare` runs it through the language model, too.

# %%
began = time.perf_counter()
talk = Session(model, film)
talk.prepare()
seen = talk.media[0]
print(f"{seen.num_frames} frames of {seen.duration_s:.0f} s; open after {time.perf_counter() - began:.1f} s")

# %% [markdown]
# Each question costs its own tokens.

# %%
for question in ("What colour is the card?", "What shape is on the card?", "Is there a red card?"):
    reply = talk.ask(question, attention=True)
    clip = max(range(len(reply.attention[0])), key=reply.attention[0].__getitem__)
    second = seen.indices[clip * model.geometry.frames_per_clip] / seen.fps
    print(
        f"{question} {reply.text}  [{reply.reused} of {reply.prompt_tokens} tokens reused, first token after "
        f"{reply.first_token_s:.2f} s, looked most at {second:.0f} s]"
    )

# %% [markdown]
# Turns of one talk, and words as they come.

# %%
talk.say("What colour is the card?", on_text=lambda text: print(text, end="", flush=True))
print()
print(talk.say("And its shape?").text)

# %% [markdown]
# Saved with its keys and values, and reopened: the next turn runs nothing of the film.

# %%
with tempfile.TemporaryDirectory() as kept:
    talk.save(kept)
    again = Session.open(model, kept)
    reply = again.say("Is there a red card?")
    print(reply.text, f"[{reply.reused} of {reply.prompt_tokens} tokens reused]")
