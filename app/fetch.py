"""Fetching what a URL serves, as an [`InputPolicy`] allows. No checkpoint brings code that opens a connection."""

from __future__ import annotations

import functools
import ipaddress
import socket
import time
import zlib
from fnmatch import fnmatch
from typing import Any

from ..inputs_metaembed import InputPolicy, check_size

try:
    import httpx
except ImportError:  # later versions of huggingface_hub bring its successor instead
    from huggingface_hub.utils import httpx

_tls = functools.cache(httpx.create_ssl_context)  # slow to make


def fetch(source: str, policy: InputPolicy) -> bytes:
    """Return what a URL serves. The policy holds for it and for every redirect."""
    end = time.monotonic() + policy.timeout
    url = httpx.URL(source)
    try:
        for _ in range(10):
            addresses = _resolve(url, policy)
            with httpx.Client(verify=_tls(), trust_env=False) as client:
                response = _get(client, url, addresses, end)
                if not response.has_redirect_location:
                    return _body(response, policy)
            url = url.join(response.headers["Location"])
    except (TimeoutError, httpx.TimeoutException) as error:
        raise ValueError(f"timed out after {policy.timeout} s") from error
    raise ValueError("the server redirects without end")


def _resolve(url: Any, policy: InputPolicy) -> list[str]:
    """Return the addresses of the host, all of which the policy allows."""
    host = url.raw_host.decode("ascii").lower()
    if url.scheme not in policy.schemes or url.scheme not in ("http", "https"):
        raise ValueError(f"the policy allows no URLs of {url.scheme}, only of {list(policy.schemes)}")
    if policy.hosts is not None and not any(fnmatch(host, pattern.lower()) for pattern in policy.hosts):
        raise ValueError(f"the policy does not allow the host {host}")
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    if not policy.private_addresses and not all(map(is_public, addresses)):
        raise ValueError(f"the address of {host} is not public, and InputPolicy(private_addresses=True) is not set")
    return addresses


def _get(client: Any, url: Any, addresses: list[str], end: float) -> Any:
    """Ask the very addresses that were checked (a second look-up could give others), each until one answers."""

    def left() -> float:
        if (seconds := end - time.monotonic()) <= 0:
            raise TimeoutError
        return seconds

    def bound(event: str, info: dict[str, Any]) -> None:  # httpx bounds each read alone, and a drip has many
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            stream, read = info["return_value"], info["return_value"].read
            stream.read = lambda size, timeout: read(size, left())

    headers = {"Host": url.netloc, "User-Agent": "metaembed", "Accept-Encoding": "identity"}
    extensions = {"sni_hostname": url.raw_host.decode("ascii"), "trace": bound}
    for address in addresses:
        where = url.copy_with(host=address)
        request = client.build_request("GET", where, headers=headers, timeout=left(), extensions=extensions)
        try:
            return client.send(request, stream=True)
        except httpx.ConnectError as error:
            failure = error
    raise failure


def _body(response: Any, policy: InputPolicy) -> bytes:
    if not response.is_success:
        raise ValueError(f"the server answered {response.status_code} {response.reason_phrase}")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        check_size(len(body), policy)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":  # which alone was asked for
        body = bytearray(zlib.decompressobj(47).decompress(body, policy.max_bytes + 1))  # gzip or deflate
        check_size(len(body), policy)
    return bytes(body)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where IPv6 wraps one of IPv4."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in ipaddress.ip_network("64:ff9b::/96") else None
        ip = ip.ipv4_mapped or ip.sixtofour or nat64 or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False))
