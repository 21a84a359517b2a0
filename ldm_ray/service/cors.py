"""Pages of other origins, which browsers let ask only where the service says so (CORS)."""

from collections.abc import Iterable

Fields = list[tuple[bytes, bytes]]
PREFLIGHT: Fields = [
    (b"access-control-allow-methods", b"GET, HEAD, POST"),
    (b"access-control-allow-headers", b"Authorization, Content-Type, Accept, If-None-Match, X-Request-Id"),
    (b"access-control-max-age", b"600"),
]
EXPOSED = (b"access-control-expose-headers", b"ETag, Retry-After, X-Request-Id")


class Origins:
    """The origins of a setting: several with commas, ``*`` for every one, none by default."""

    def __init__(self, setting: str) -> None:
        self.allowed = frozenset(filter(None, (origin.strip().rstrip("/") for origin in setting.split(","))))

    def fields(self, origin: str | None) -> Fields:
        """What an answer to a page of this origin says; nothing where no origins are set."""
        if not self.allowed:
            return []
        if "*" in self.allowed:
            return [(b"access-control-allow-origin", b"*"), EXPOSED]
        varies: Fields = [(b"vary", b"Origin")]
        if origin not in self.allowed:
            return varies
        return [*varies, (b"access-control-allow-origin", origin.encode("latin-1")), EXPOSED]

    def is_preflight(self, method: str, names: Iterable[str], origin: str | None) -> bool:
        """Whether a browser asks if a page of an allowed origin may ask."""
        allowed = origin is not None and ("*" in self.allowed or origin in self.allowed)
        return allowed and method == "OPTIONS" and "access-control-request-method" in names
