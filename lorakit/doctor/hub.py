"""Access to the Hugging Face Hub: whether it can be reached, and whether there is a token."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

from lorakit.doctor.finding import Finding

_AREA = "hub"
_TIMEOUT_SECONDS = 2.0


class Request:
    """A request to the Hub in the background; ``problem`` is None if it was answered."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._problem: str | None = f"no answer within {_TIMEOUT_SECONDS:g} seconds"
        self._thread = threading.Thread(target=self._run, name="lorakit-hub", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            request = urllib.request.Request(f"{self._endpoint}/api/models?limit=1", method="HEAD")
            urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()
        except urllib.error.HTTPError:
            self._problem = None  # an answer, even if it is an error
        except (OSError, ValueError) as error:
            self._problem = str(getattr(error, "reason", error))
        else:
            self._problem = None

    def problem(self) -> str | None:
        self._thread.join(_TIMEOUT_SECONDS)
        return self._problem


def start_request() -> Request | None:
    """Ask the Hub, unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return None if constants.HF_HUB_OFFLINE else Request(constants.ENDPOINT)


def hub_findings(request: Request | None) -> Iterator[Finding]:
    """The endpoint, whether it answers, and whether a token is there, which is never printed."""
    from huggingface_hub import constants, get_token

    yield Finding(_AREA, "endpoint", constants.ENDPOINT, constants.ENDPOINT)
    if request is None:
        text = "not asked, because HF_HUB_OFFLINE is set: only cached files are used"
        yield Finding(_AREA, "access", None, text)
    elif (problem := request.problem()) is None:
        yield Finding(_AREA, "access", True, "reachable")
    else:
        text = f"not reachable ({problem}): only cached and local files can be used"
        hint = "check the network, HF_ENDPOINT and HTTPS_PROXY, or export HF_HUB_OFFLINE=1"
        yield Finding(_AREA, "access", False, text, "warning", hint)
    has_token = bool(get_token())
    text = "present" if has_token else "none; gated models need one (hf auth login)"
    yield Finding(_AREA, "token", has_token, text)
