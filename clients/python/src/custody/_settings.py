"""What a client is made with: address, TLS, times. Arguments come before the environment; a mistake is said at once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

__all__ = ["Settings", "Tls"]

_DEFAULT_TIMEOUT_SECONDS = 30.0
_DEFAULT_MAX_RETRIES = 3
_LONGEST_SOCKET_PATH = 107  # bytes in sockaddr_un, less the closing zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Mutual TLS by PEM files: the trusted CA, and the workload's own certificate and key.

    `server_name` is the DNS name in the sidecar's certificate, where it is not the host of the address; over a Unix socket
    it is "localhost" unless given.
    """

    ca: str | Path
    certificate: str | Path
    key: str | Path
    server_name: str | None = None

    def fingerprint(self) -> tuple[tuple[int, int, int], ...]:
        """Tell one set of files from the next: a workload's certificate is renewed in place, often every hour."""
        files = (Path(path).stat() for path in (self.ca, self.certificate, self.key))
        return tuple((file.st_ino, file.st_mtime_ns, file.st_size) for file in files)

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files as they are now."""
        return grpc.ssl_channel_credentials(
            root_certificates=Path(self.ca).read_bytes(),
            private_key=Path(self.key).read_bytes(),
            certificate_chain=Path(self.certificate).read_bytes(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where the sidecar is, and how long and how often to try. `timeout_seconds` covers a call with all its retries."""

    address: str
    tls: Tls | None
    timeout_seconds: float
    max_retries: int

    @classmethod
    def read(
        cls, *, address: str | None, tls: Tls | None, timeout_seconds: float | None, max_retries: int | None
    ) -> Self:
        """Take the arguments, and the environment (CUSTODY_ADDRESS, CUSTODY_TIMEOUT, CUSTODY_MAX_RETRIES) for the others."""
        address = address or os.environ.get("CUSTODY_ADDRESS", "")
        _check_address(address, tls)
        if timeout_seconds is None:
            timeout_seconds = _number("CUSTODY_TIMEOUT", _DEFAULT_TIMEOUT_SECONDS)
        if max_retries is None:
            max_retries = int(_number("CUSTODY_MAX_RETRIES", _DEFAULT_MAX_RETRIES))
        if not 0 < timeout_seconds <= 3600:
            raise ValueError("the timeout must be above 0 and at most 3600 seconds (CUSTODY_TIMEOUT)")
        if not 0 <= max_retries <= 10:
            raise ValueError("the number of retries must be 0 to 10 (CUSTODY_MAX_RETRIES)")
        return cls(address=address, tls=tls, timeout_seconds=timeout_seconds, max_retries=max_retries)

    def channel_options(self) -> list[tuple[str, str | int]]:
        """Name the server, and keep gRPC from retrying: retries are counted here, where it is known what may be repeated."""
        options: list[tuple[str, str | int]] = [
            ("grpc.enable_retries", 0),
            ("grpc.service_config_disable_resolution", 1),
            ("grpc.enable_http_proxy", 0),  # a sidecar is never behind a proxy, whatever the environment says
        ]
        name = self.tls.server_name if self.tls and self.tls.server_name else None
        if name is None and self.address.startswith("unix:"):
            name = "localhost"
        if name is not None:
            options.append(("grpc.default_authority", name))
        return options


def _check_address(address: str, tls: Tls | None) -> None:
    if not address:
        raise ValueError("the sidecar's address is missing: give address or set CUSTODY_ADDRESS")
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not path.startswith("/"):
            raise ValueError("the address of a Unix socket is unix:/ and an absolute path")
        if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
            raise ValueError(f"the path of a Unix socket has at most {_LONGEST_SOCKET_PATH} bytes")
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("the address is unix:/path or host:port")
    if tls is None:
        raise ValueError("an address of host:port needs tls: the sidecar takes no unprotected TCP")


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "").strip()
    try:
        return float(text) if text else default
    except ValueError:
        raise ValueError(f"{name} is not a number") from None
