"""The client of the Hub: the access token, timeouts, and errors as one line without secrets."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorakit.errors import HubError, UserError, printable
from lorakit.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: Without an answer for so long, a request has failed; the client itself would wait forever.
TIMEOUT_SECONDS = 60.0
_LOG_IN = "run hf auth login, or set HF_TOKEN (https://huggingface.co/settings/tokens)"
#: HTTP status -> what it means, and a hint.
_STATUS = {
    401: ("the access token is not valid", _LOG_IN),
    403: ("the access token does not allow writing there", "use a token with write access"),
    404: ("no such repository, or the access token has no access to it", None),
    409: ("the repository is being changed by another process", "try again"),
    413: ("a file is larger than the Hub accepts", None),
    429: ("too many requests", "try again later"),
}
#: Errors that the user can correct.
_OF_THE_USER = (401, 403, 404)
_URL = re.compile(r"https?://\S+")
_TOKEN = re.compile(r"hf_\w{6,}|(?i:bearer)\s+\S+")


def hub_api(repo: str) -> HfApi:
    """Return the client with the user's token. Raises UserError if there is none, or offline."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        raise UserError(
            f"{repo}: HF_HUB_OFFLINE is set, so nothing is pushed to the Hub", hint="unset it"
        )
    token = get_token()
    if not token:
        raise UserError(f"{repo}: there is no access token for the Hub", hint=_LOG_IN)
    return HfApi(token=token, library_name="lorakit", library_version=__version__)


@contextmanager
def requests(repo: str) -> Iterator[None]:
    """Run calls of the client: with a timeout, bars on terminals only, and errors turned into
    UserError if the user can correct them, else HubError. Messages start with ``repo``."""
    from huggingface_hub import get_session
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    session = get_session()
    timeout, session.timeout = session.timeout, TIMEOUT_SECONDS
    hides_bars = not (sys.stderr.isatty() or are_progress_bars_disabled())
    if hides_bars:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the Hub's remarks about the card
            yield
    except (HubError, UserError):
        raise
    except Exception as error:  # of the client, its HTTP library, or hf_xet
        kind = UserError if _status(error) in _OF_THE_USER else HubError
        problem, hint = reason(error)
        raise kind(f"{repo}: {problem}", hint=hint) from error
    finally:
        session.timeout = timeout
        if hides_bars:
            enable_progress_bars()


def reason(error: Exception) -> tuple[str, str | None]:
    """Why a request failed, in one line, without addresses and tokens, which may be secret; and a
    hint."""
    status = _status(error)
    text = str(getattr(error, "server_message", None) or "" if status else error)
    text = _TOKEN.sub("***", _URL.sub("(address)", printable(" ".join(text.split()))))[:200]
    if status is None:
        from huggingface_hub.errors import HfHubHTTPError

        # The base classes are the error of the HTTP library, and OSError.
        unreachable = isinstance(error, HfHubHTTPError.__bases__)
        what = "the Hub cannot be reached" if unreachable else "the upload failed"
        return f"{what} ({type(error).__name__}{f': {text}' if text else ''})", None
    other = ("the Hub failed", "try again later") if status >= 500 else ("refused", None)
    what, hint = _STATUS.get(status, other)
    return f"{what} (HTTP {status}{f': {text}' if text else ''})", hint


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
