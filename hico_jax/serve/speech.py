"""Ids to text while they come: pieces that join to the whole answer, and an end where a stop string begins.

In: token ids one by one. Out: text that will not change any more.
Next: hico_jax/serve/engine.py
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline import chat
from data_pipeline.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what half a character decodes to
WINDOW, OVERLAP = 64, 8  # tokens decoded again with each that comes, at least; those of them whose text is known


class Speech:
    """An answer in the making. All pieces of `push` and `finish` joined are `chat.clean_answer` of the ids.

    With stop strings the text ends before the first of them.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(s for s in stop if s)
        self.ids: list[int] = []
        self.text = ""  # said already
        self.stopped = False
        self.begin, self.before, self.skip = 0, "", 0  # the window's first token, the text before it, what both share

    def push(self, token: int) -> str:
        """The text that one more token makes certain."""
        self.ids.append(token)
        whole = self._whole().lstrip()
        end = self._stop_in(whole)
        if end is not None:
            self.stopped = True
            return self._say(whole[:end])
        return self._say(whole[: self._certain(whole)])

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        return self._say(chat.clean_answer(self.tokenizer, self.ids))

    def _whole(self) -> str:
        """The text so far. Of a long answer only a window is decoded, so that a token's cost does not grow."""
        decode = self.tokenizer.decode
        whole = self.before + decode(self.ids[self.begin :])[self.skip :]
        if len(self.ids) - self.begin >= 2 * WINDOW:
            cut = len(self.ids) - WINDOW
            before = self.before + decode(self.ids[self.begin : cut])[self.skip :]
            begin, skip = cut - OVERLAP, len(decode(self.ids[cut - OVERLAP : cut]))
            if before + decode(self.ids[begin:])[skip:] == whole:  # not where the cut splits a character
                self.begin, self.before, self.skip = begin, before, skip
        return whole

    def _say(self, text: str) -> str:
        if len(text) <= len(self.text):
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece

    def _stop_in(self, text: str) -> int | None:
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        return min(found) if found else None

    def _certain(self, text: str) -> int:
        """How much of a text stays, whatever follows."""
        end = len(text.rstrip().rstrip(BROKEN).rstrip())
        for stop in self.stop:
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    end = min(end, len(text) - size)
                    break
        mark = "<|im_end|>"  # cut from the end of an answer should a tokenizer spell it out
        for size in range(len(mark), 0, -1):
            if text.endswith(mark[:size]):
                return min(end, len(text[: len(text) - size].rstrip()))
        return end
