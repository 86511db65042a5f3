"""Exit with 0 if each worker in this container says that it is ready, else print why one does not and exit with 1.

What Docker's HEALTHCHECK runs; the image has no curl. It reads the variables that the service reads.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request


def ports() -> range:
    """Return the ports to ask: one for each worker, or the port of the clients, where any worker answers."""
    first = os.environ.get("PERCEIVER_MANAGEMENT_PORT")
    if not first:
        port = int(os.environ.get("PERCEIVER_PORT") or 8000)
        return range(port, port + 1)
    workers = os.environ.get("PERCEIVER_WORKERS") or "1"
    count = int(workers) if workers.isdecimal() else 1  # auto: the first worker speaks for all
    return range(int(first), int(first) + max(count, 1))


def problem(port: int) -> str:
    """Return why what listens on a port is not ready; "" if it is."""
    tls = os.environ.get("PERCEIVER_TLS_CERT")
    context = None
    if tls:  # the certificate names the public host, not this address
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/health/ready"
    # Docker passes on the proxy of the host's ~/.docker/config.json, which knows nothing of this address.
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        urllib.request.build_opener(*handlers).open(url, timeout=3).close()
    except urllib.error.HTTPError as error:
        return error.read(1000).decode(errors="replace")
    except OSError as error:
        return f"{url}: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(next(filter(None, map(problem, ports())), 0))
