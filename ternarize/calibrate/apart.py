"""Documents that a training keeps apart: some choose the state that is kept, some give the figures.

Which ones, the digest of a document says, so that every pass over a text, a calibration before the
training, and a second run of it all agree, and equal documents are in one part. Of a small text
one document in 16 chooses and one in 16 gives the figures, of a large one one in 32 each.

Documents that are too long are cut into sections, at blank lines where there are any, and a small
text of few documents all the more; chats stay whole.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ternarize.calibrate.samples import LEAST_SECTION, cut_text
from ternarize.calibrate.texts import Document, Opened, open_texts
from ternarize.errors import UsageError
from ternarize.measure.documents import DEFAULT

SMALL = 1 << 24  # characters, up to which a text is small, and stays in memory
FEW_DOCUMENTS = 256  # documents, below which a small text is cut into sections
SECTIONS = 1024  # that such a text is cut into, if they are of LEAST_SECTION characters at least
LONGEST = 1 << 16  # characters of a document, beyond which it is cut
ONE_IN = {True: 16, False: 32}  # documents of a small text, and of a large one, for each part
NO_END = 1 << 62  # characters of a Hub data set that may be read


class Divided(NamedTuple):
    """A text whose documents are in three parts.

    name      how the record calls it
    files     that are read, if it is a folder or of the Hub
    notes     what is to be said of it
    one_in    documents, of which one chooses and one gives the figures
    one_pass  over its documents, none of them empty
    """

    name: str
    files: list[str]
    notes: list[str]
    one_in: int
    one_pass: Callable[[], Iterator[Document]]

    def part(self, which: str) -> Iterator[Document]:
        """The documents of one pass that train ("train"), choose ("held"), or are the "report"."""
        return (each for each in self.one_pass() if part_of(each, self.one_in) == which)


def part_of(document: Document, one_in: int) -> str:
    """Which part of a text a document belongs to: "train", "held" or "report"."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return {0: "held", 1: "report"}.get(int.from_bytes(digest[:8], "big") % one_in, "train")


def divide_text(
    given: str, column: str | None, seed: int, tokenizer: Any, pool: int = NO_END
) -> Divided:
    """A text in three parts; the arguments are those of `open_texts`.

    Of a data set of the Hub all passes read the revision that was found first. Raises UsageError
    when it cannot be read, or has no text.
    """
    pool = max(pool, 2 * SMALL)  # so that all agree on whether it is small
    first = open_texts(given, column, seed, tokenizer, pool, LONGEST)
    head: list[Document] = []
    size = 0
    for document in _full(first.stream):
        head.append(document)
        size += len(document.text)
        if size > SMALL:
            break
    if not head:
        raise UsageError(given, "has no text", "documents to train on", "Check the file")
    if size <= SMALL:
        longest = max(LEAST_SECTION, size // SECTIONS) if len(head) < FEW_DOCUMENTS else LONGEST
        cut = list(_sections(head, longest))
        return Divided(*first[1:], ONE_IN[True], lambda: iter(cut))
    here = given == DEFAULT or Path(given).expanduser().exists()
    name = given if here else first.name

    def one_pass() -> Iterator[Document]:
        again = open_texts(name, column, seed, tokenizer, pool, LONGEST)
        return _sections(_full(again.stream), LONGEST)

    return Divided(*first[1:], ONE_IN[False], one_pass)


def open_training_part(
    given: str, column: str | None, seed: int, tokenizer: Any, pool: int
) -> Opened:
    """The documents of a text that train, for a calibration; as `open_texts`."""
    text = divide_text(given, column, seed, tokenizer, pool)
    return Opened(text.part("train"), text.name, text.files, text.notes)


def _full(stream: Iterable[Document]) -> Iterator[Document]:
    return (document for document in stream if document.text.strip())


def _sections(documents: Iterable[Document], longest: int) -> Iterator[Document]:
    """Documents, and of those with more characters sections; chats whole."""
    for document in documents:
        if document.answers is not None or len(document.text) <= longest:
            yield document
            continue
        for index, piece in enumerate(cut_text(document.text, longest)):
            yield Document(piece, document.begin and not index)
