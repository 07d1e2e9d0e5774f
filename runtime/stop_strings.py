"""Find stop strings in a text that comes in parts; nothing of them is shown."""

from .tokenizer import StreamDecoder, Tokenizer


class StopSearch:
    """Passes a text on up to the first stop string: the one that is complete first, and of those
    complete at the same place the longest. How the text is cut into parts changes nothing.

    What may be the beginning of a stop string is held back until more text tells.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """What can be shown; nothing once a stop string was found."""
        if self.found:
            return ""
        text = self._held + text
        starts = {stop: text.find(stop) for stop in self._stops}
        ends = [(start + len(stop), start) for stop, start in starts.items() if start >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        kept = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """What was held back, when no more text follows."""
        text, self._held = self._held, ""
        return text


class TextStream:
    """The text of generated ids as it becomes complete, up to a stop string; "" without a
    tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, stops: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self._search = StopSearch(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._search.found

    def push(self, token_id: int, is_last: bool) -> str:
        """The text that can be shown now; with the last id all of it."""
        if self._decoder is None:
            return ""
        text = self._search.push(self._decoder.push(token_id))
        return text + self.finish() if is_last else text

    def finish(self) -> str:
        """What was held back, when no more ids follow."""
        if self._decoder is None:
            return ""
        return self._search.push(self._decoder.flush()) + self._search.flush()


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text a stop string may begin with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
