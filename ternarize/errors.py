"""What can go wrong, as a small tree that programs can catch.

    TernarizeError
    ├── UsageError        an option or argument has a value that cannot be used
    ├── CheckpointError   the source cannot be read or cannot be converted
    │   ├── WeightError   a weight is NaN or infinite
    │   └── RankError     another process of the same work has ended
    ├── SelectionError    no rule says what to do with a tensor, or a pattern matches none
    ├── FormatError       a packed file breaks a rule of its format
    │   └── DigestError   its bytes are not the ones that were written
    ├── QualityError      the result is worse than a bound that was asked for
    └── OutputError       the result cannot be put where it was asked for

Every error is made from four parts, and its message is one line of them:

    CheckpointError("model.safetensors: lm_head.weight", "3 of 64 weights are NaN", "finite ones",
                    "Repair the source")
    model.safetensors: lm_head.weight: 3 of 64 weights are NaN; expected finite ones. Repair the
    source.

The class names and the names of the parts are stable; the wording is not.
"""

import errno
from collections.abc import Sequence

LONGEST_MESSAGE = 2000  # characters of a message; names of a hostile file can have any length

# what to do about an error of the system, by its number
REMEDY = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Get the permission"),
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "Allow more open files (ulimit -n) or use fewer --threads"
    ),
}


class TernarizeError(Exception):
    """Base of all errors that a user or a file can cause.

    where     file, tensor or option
    found     what is, with its value
    expected  what should be there instead, to be read after "expected"; "" where that is plain
    remedy    what to do, a sentence without its full stop; "" where nobody can say
    """

    def __init__(
        self, where: object, found: str = "", expected: str = "", remedy: str = ""
    ) -> None:
        super().__init__(str(where), found, expected, remedy)
        self.where, self.found, self.expected, self.remedy = str(where), found, expected, remedy

    def within(self, where: object) -> "TernarizeError":
        """The same error of a part of something: `where` stands in front of its own."""
        return type(self)(f"{where}: {self.where}", self.found, self.expected, self.remedy)

    def __str__(self) -> str:
        """The message in one line, and nothing in it that a terminal would act on.

        Names come from files: line breaks, escape sequences and marks that turn the direction of
        writing are shown as their codes.
        """
        text = f"{self.where}: {self.found}" if self.found else self.where
        text += f"; expected {self.expected}." if self.expected else "." * bool(self.found)
        text = printable(text + (f" {self.remedy}." if self.remedy else ""))
        if len(text) <= LONGEST_MESSAGE:
            return text
        half = LONGEST_MESSAGE // 2
        return f"{text[:half]} [...] {text[-half:]}"


def printable(text: str) -> str:
    """A text from a file, as one line that can be printed."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: object) -> str:
    """What another library says, as a part of a message of ours.

    A line that ends in a colon announces the next one.
    """
    first, *others = (str(error).strip() or "no message").split("\n")
    if first.endswith(":") and others:
        first += " " + others[0].strip()
    return shortened(first, 200)


def is_no_memory(error: Exception) -> bool:
    """Whether an exception says that memory, on the CPU or a device, or threads have run out.

    torch's own is known by its name: importing torch takes a while.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "can't start new thread", "Resource temporarily unavailable")
    return any(each in str(error) for each in words)


class UsageError(TernarizeError):
    """An option or argument has a value that cannot be used."""


class CheckpointError(TernarizeError):
    """The source checkpoint cannot be read or cannot be converted."""


class WeightError(CheckpointError):
    """A weight of the source is NaN or infinite."""


class RankError(CheckpointError):
    """Another process of the same work has ended."""


class SelectionError(TernarizeError):
    """No rule says what to do with a tensor, or a pattern matches no tensor."""


class FormatError(TernarizeError):
    """A packed file breaks a rule of its format."""


class DigestError(FormatError):
    """The bytes of a packed file are not the bytes that were written."""


class QualityError(TernarizeError):
    """A converted model is worse than a bound that was asked for."""


class OutputError(TernarizeError):
    """The result cannot be put where it was asked for."""


def damaged(where: object, found: str, expected: str = "") -> FormatError:
    """The error for bytes that no program of ours writes."""
    return FormatError(where, found, expected, "The file is damaged: fetch it again")


def shortened(text: str, most: int) -> str:
    """The beginning of a text, of at most about so many characters, cut between words; no stop."""
    if len(text) <= most:
        return text.rstrip(". ")
    return text[: most + 1].rsplit(" ", 1)[0].rstrip(".,; ") + " ..."
