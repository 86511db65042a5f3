"""Keys: which requests need one, and whether they have it."""

from hmac import compare_digest
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.paths import is_keyed_v2
from service.api.response import Headers
from service.errors import ReloadDisabled, Unauthorized

RELOAD: Final = ("POST", "/models/reload")
KEYED: Final = frozenset({("GET", "/models")})  # endpoints for inference ask by themselves


class RequireKey:
    """Asks for a key where the settings have one: API keys for the models, the admin key for reloading."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], admin_keys: tuple[str, ...]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.admin_keys = [key.encode() for key in admin_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or raise ReloadDisabled or Unauthorized."""
        if scope["type"] == "http":
            asked = (scope["method"], scope["path"])
            if asked == RELOAD:
                if not self.admin_keys:
                    raise ReloadDisabled()
                check_key(scope["headers"], self.admin_keys)
            elif self.keys and (asked in KEYED or is_keyed_v2(scope["path"])):
                check_key(scope["headers"], self.keys)
        await self.app(scope, receive, send)


def check_key(headers: Headers, keys: list[bytes]) -> None:
    """Raise Unauthorized unless the headers hold one of the keys; every key is compared, in constant time."""
    given = [value for name, value in headers if name == b"x-api-key"]
    given += [
        value[7:].strip() for name, value in headers if name == b"authorization" and value[:7].lower() == b"bearer "
    ]
    if not sum(compare_digest(one, key) for one in given for key in keys):  # a sum looks at all of them
        raise Unauthorized()
