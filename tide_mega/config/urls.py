"""URLs in what is stored and printed: without the passwords and tokens that they may have."""

import re

_IN_FRONT = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_SECRET_KEY = r"[^=&;\s]*(?:token|key|secret|passw|signature|sig|auth|credential)[^=&;\s]*"
_IN_QUERY = re.compile(rf"([?&;]{_SECRET_KEY}=)[^&;#\s'\"]+", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def without_credentials(text: str) -> str:
    """Return `text` with the user and password, and the tokens of the query, of every URL in it left out."""
    return _IN_QUERY.sub(r"\1***", _IN_FRONT.sub("", text))


def has_credentials(text: str) -> bool:
    """Whether a URL in `text` has a user, a password or a token."""
    return "://" in text and without_credentials(text) != text


def is_url(path: str) -> bool:
    """Whether what should be a path is a URL."""
    return _URL.match(path) is not None
