"""What the client of the Hub raises, as one error of ours: which part failed, and what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ternarize.errors import TernarizeError, shortened

LOGIN = "Check the name, or log in with `hf auth login`"


@contextmanager
def hub_errors(
    repo: str, revision: str | None, kind: type[TernarizeError], goes_on: str = "Try again"
) -> Iterator[None]:
    """Turn what the client of the Hub raises into one line of `kind`.

    goes_on  what to do where the fault may pass

    What may pass (network, server, disk) has an OSError as its cause.
    """
    from huggingface_hub import errors

    # base of all errors of its HTTP library, of which there have been two
    http_error: type[Any] = errors.HfHubHTTPError.__mro__[1]
    at = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.HFValidationError as error:
        raise kind(repo, bare_line(error), "user/name", "Check the name") from None
    except (http_error, OSError, RuntimeError, errors.EntryNotFoundError) as raised:
        behind = raised.__cause__ if isinstance(raised, RuntimeError) else None
        cause: Any = behind or raised  # the first says "Error while uploading"
        lasting = _lasting(cause)
        if lasting is not None:
            raise kind(at, *lasting) from None
        found, expected, remedy = _passing(cause)
        remedy = f"{remedy}. {goes_on}" if remedy else goes_on
        raise kind(at, found, expected, remedy) from OSError(bare_line(raised))


def _lasting(error: Any) -> tuple[str, str, str] | None:
    """What is, what is expected and what to do; None for an error that may pass by itself."""
    from huggingface_hub import errors

    status = _status(error)
    if isinstance(error, errors.RevisionNotFoundError):
        return "the Hub has no such branch, tag or commit", "", "Check the name"
    if isinstance(error, errors.GatedRepoError):
        ask = "Ask for access on its page, then log in with `hf auth login`"
        return "is gated", "the token of a user who was let in", ask
    if isinstance(error, errors.RepositoryNotFoundError):
        no = "the Hub has no such model, or it is private and the token, if any, may not see it"
        return no, "", LOGIN
    if status == 401:
        return "the Hub does not know the token (401)", "", LOGIN
    if status == 403:
        make = "Make one at huggingface.co/settings/tokens"
        no = f"the token may not do that (403: {bare_line(error)})"
        return no, "one with the permission", make
    return None


def _passing(error: Any) -> tuple[str, str, str]:
    """The same of an error that may pass; what to do first, if there is more than to go on."""
    from huggingface_hub import constants, errors

    status = _status(error)
    if status in (409, 412):
        return f"was changed by somebody else in the meantime ({status})", "it at rest", ""
    if status == 429:
        return "the Hub asks for fewer requests (429)", "", "Wait a while"
    if status is not None and status >= 500:
        return f"the Hub is out of order ({status})", "", ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full", "", "Make room, or move the cache (HF_HOME)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            no = "is not in the cache as a whole, and the Hub is not asked (HF_HUB_OFFLINE=1)"
            return no, "a model that has been fetched", "Fetch it with a network first"
        no = "no such directory, it is not in the cache, and the Hub cannot be reached"
        return f"{no} ({bare_line(error)})", "", "Check the network"
    return f"the Hub did not answer ({type(error).__name__}: {bare_line(error)})", "", ""


def _status(error: Any) -> int | None:
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def bare_line(error: Any) -> str:
    """The beginning of an error's text, in one line, without tokens and signed queries."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.sub(r"(?i)\b(bearer) ([^'\"]*(?=['\"])|\S+)", r"\1 ***", text)
    text = re.sub(r"\bhf_\w+", "hf_***", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]*", r"\1", text)
    return shortened(text, 160)
