"""`hico world`: write a folder of videos with known answers, or one long film with a card to find.

In: the command's options. Out: files, and on the terminal what was made and how to use it.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex

from data_pipeline.world import films, make
from hico_jax.report import progress


def main(args: argparse.Namespace) -> None:
    """Make the world, or the film when one is named.

    Raises:
      ValueError: an unknown preset, a folder that holds another world, a card outside the film.
    """
    if args.film:
        make_film(args)
    else:
        with progress.bar("videos") as tick:
            world = make.make_world(args.out, preset=args.preset, seed=args.seed, progress=tick)
        media = ", ".join(f"{count:,} {kind}" for kind, count in world["media"].items())
        print(f"{args.out}: {media}; {sum(world['items'].values()):,} annotations")


def make_film(args: argparse.Namespace) -> films.Film:
    """One film with one card; says what can be asked about it."""
    path = pathlib.Path(args.film)
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = None
    if args.needle_at is not None:
        room = args.seconds - films.Needle.seconds
        if args.needle_at > room:
            raise ValueError(
                f"--needle-at {args.needle_at:g} is too late: a film of {args.seconds:g} s has room for a card of "
                f"{films.Needle.seconds:g} s until {room:g} s"
            )
        depth = args.needle_at / room if room else 0.0
    hidden = films.needles(args.seed, args.seconds, depth=depth)
    film = films.haystack(path, num_seconds=args.seconds, seed=args.seed, needles=hidden)
    print(f"{path}: {args.seconds:g} s; a {hidden[0].colour} {hidden[0].content} at {hidden[0].start_s:g} s")
    print(f"hico ask {shlex.quote(str(path))} {shlex.quote(film.questions[0].text)}")
    print(f"the answer is: {film.questions[0].answer}")
    return film
