"""A made-up world of videos with exact ground truth, so that everything can be learnt and checked without a download.

`make_world` writes a folder as a user's data would look; `haystack` makes one long film with needles in it.
"""

from data_pipeline.world.draw import frame, render
from data_pipeline.world.films import Film, Needle, haystack, needles
from data_pipeline.world.make import make_world
from data_pipeline.world.presets import PRESETS, Preset
from data_pipeline.world.questions import KINDS, Question, ask, ask_all, multiple_choice
from data_pipeline.world.scene import Card, Ground, Mover, Scene
from data_pipeline.world.sheet import contact_sheet
from data_pipeline.world.texts import corpus, text_items

__all__ = [
    "KINDS", "PRESETS", "Card", "Film", "Ground", "Mover", "Needle", "Preset", "Question", "Scene", "ask", "ask_all",
    "contact_sheet", "corpus", "frame", "haystack", "make_world", "multiple_choice", "needles", "render", "text_items",
]  # fmt: skip
