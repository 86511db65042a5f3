"""Posts an image to the service and prints the answer; ends with status 1 and a sentence where that fails.

`helm test` runs it in the service's own image, so it uses the standard library alone.
Variables: URL is that of /predict; API_KEYS_FILE, where keys are asked for, is a file with one key a line.
"""

import base64
import json
import os
import sys
import urllib.error
import urllib.request

# 32 x 32 pixels of one red.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42mM4IadBU8QwasGoBaMWjFow"
    "asGoBaMWjFowasGoBaMWDBULAIv5OD3Z237dAAAAAElFTkSuQmCC"
)


def problem() -> str:
    """Return what is wrong; "" where the service names classes."""
    url = os.environ["URL"]
    request = urllib.request.Request(url, PNG, {"Content-Type": "image/png"} | key())  # noqa: S310 - the chart's own
    # A proxy of the cluster's environment knows nothing of this address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            body = response.read().decode()
    except urllib.error.HTTPError as error:
        return f"{url}: {error.code}: {error.read(1000).decode(errors='replace')}"
    except OSError as error:
        return f"{url}: {error}"
    print(body)
    top = json.loads(body)["predictions"][0]["top"]
    return "" if top and top[0]["label"] else f"{url}: the answer names no class"


def key() -> dict[str, str]:
    """Return the header with the first key of the file; none where there is no file."""
    path = os.environ.get("API_KEYS_FILE")
    if path is None:
        return {}
    with open(path, encoding="utf-8-sig") as file:  # noqa: PTH123 - nothing to import for one line
        keys = [line.split("#")[0].strip() for line in file]
    return {"X-API-Key": next(filter(None, keys))}


if __name__ == "__main__":
    sys.exit(problem() or 0)
