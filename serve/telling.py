"""What clients are told when something is wrong: why, when to come again, and not where things lie on this machine."""

from __future__ import annotations

import math
import re
import time

from ..errors import UsageError

# The folders of a path: parts may hold spaces, but a space before a slash ends a path. Not those of an URL.
_FOLDERS = re.compile(
    r"""(?<![\w:/\\])(?:[A-Za-z]:)?(?:[\\/](?!\s)(?:[^\s\\/:*?"'<>|]|[ ](?=[^\s\\/]))+)*[\\/](?=[^\s\\/])"""
)


def told(error: Exception) -> str:
    """An error's text for a client; the whole of it is for the log. A UsageError's own words came from the client."""
    return str(error) if isinstance(error, UsageError) else without_folders(str(error))


def without_folders(text: str) -> str:
    """Paths become their last part."""
    return _FOLDERS.sub("", text)


def not_now(retry_s: float) -> dict[str, str]:
    """The headers of a 429. The second is that of Segmind's API, whose form is not published: ISO 8601 here."""
    wait_s = math.ceil(retry_s)
    again = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + wait_s))
    return {"retry-after": str(wait_s), "x-rate-limit-reset-at-utc": again}
