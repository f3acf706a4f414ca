"""What a browser's page must not do to a service that asks for no keys: make it work, or read its answers.

Whoever reaches such a service may use it, and a browser on the same machine reaches it in the name of any page. Two
things tell: the page's site, which browsers name in the header Origin, and the name by which the service was asked for,
which is the page's own where its owner makes that name mean this machine (DNS rebinding). A service that asks for keys
needs neither: no page has one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Container
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.requests import Request

from lorauter.errors import PermissionDenied


def check_no_other_site(request: Request, trusted: Container[str], origins: Container[str] = ()) -> None:
    """Raise PermissionDenied for what a page of another site makes a browser send.

    Args:
        trusted: further hosts, in lower case, that the service may be asked for by, and whose pages may ask.
        origins: origins whose pages may ask, too.
    """
    named = request.headers.get("host")
    host = _hostname(f"//{named}")
    server = request.scope.get("server")
    if named is not None and server and not _is_safe(host) and host not in trusted and is_local(server[0]):
        raise PermissionDenied(
            f"got the host {named[:100]!r} for a service of this machine that asks for no keys; ask for localhost, "
            "configure keys, or add the name to access.trusted_hosts"
        )
    for origin in request.headers.getlist("origin"):
        site = _hostname(origin)
        if origin in origins:
            continue
        if site != host and not (is_local(site) and is_local(host)) and site not in trusted:
            raise PermissionDenied(
                f"got a request from a page of {origin[:100]!r}, and the service asks for no keys; configure keys, or "
                "add the page's host to access.trusted_hosts"
            )


def is_local(host: str) -> bool:
    """Whether a name or an address means the machine itself, whoever resolves it."""
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") if address is None else address.is_loopback


def _is_safe(host: str) -> bool:
    """Whether nobody can make a host mean another machine than it does: addresses need no resolving."""
    return is_local(host) or _address(host) is not None


@lru_cache(maxsize=32)  # clients ask for a service by few names
def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(maxsize=32)
def _hostname(url: str) -> str:
    """The host of a URL, in lower case; empty where there is none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
