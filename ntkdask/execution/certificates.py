"""TLS files of a connection: checked before it is made, and what their mismatch with a scheduler's looks like in Dask's errors."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distributed import Security

from ntkdask.errors import UserError
from ntkdask.files import home_expanded

EXPECTED = "Expected security=(ca, certificate, key), paths of files in PEM format."


def security_of(given: Any) -> Security | None:
    """Dask's Security from the paths of three PEM files; None and a Security as they are.

    UserError for files that are missing, hold something else, or do not belong together.
    """
    if given is None or isinstance(given, Security):
        return given
    try:
        ca, certificate, key = (os.fspath(home_expanded(p)) for p in given)
    except (TypeError, ValueError) as error:
        raise UserError(f"security is {given!r}. {EXPECTED}") from error
    missing = [p for p in (ca, certificate, key) if not Path(p).is_file()]
    if missing:
        raise UserError(f"TLS files that are not there: {', '.join(missing)}. {EXPECTED}")
    _require_usable(ca, certificate, key)
    parts = {"cert": certificate, "key": key}
    roles = {f"tls_{role}_{part}": parts[part] for role in ("client", "scheduler", "worker") for part in parts}
    return Security(tls_ca_file=ca, require_encryption=True, **roles)


def _require_usable(ca: str, certificate: str, key: str) -> None:
    """UserError unless the files hold an authority, a certificate and the certificate's key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as error:
        raise UserError(
            f"{ca} is no certificate of an authority in PEM format ({_reason(error)}). {EXPECTED}"
        ) from error
    try:
        # a key with a password must not ask for it on the terminal
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise UserError(f"the key {key} does not belong to the certificate {certificate}. {EXPECTED}") from error
        raise UserError(
            f"{certificate} and {key} are no certificate and key in PEM format, without a password ({_reason(error)}). {EXPECTED}"
        ) from error


def mismatch(error: BaseException, encrypted: bool) -> str | None:
    """What does not fit where both sides were there and did not trust each other; None for other errors.

    The error is Dask's; encrypted: the address begins with tls://.
    """
    for cause in _causes(error):
        text = f"{cause}"
        if isinstance(cause, ssl.SSLCertVerificationError) or "certificate does not match" in text:
            return "the scheduler's certificate is not signed by the authority that was given"
        if "_ALERT_" in text:  # what the other side of a handshake says
            return "the scheduler does not accept the certificate that was given"
        if "WRONG_VERSION_NUMBER" in text or "IOStream is not idle" in text:
            return "it speaks no TLS: its address begins with tcp://"
        # its alert may come too late, after it hung up
        if encrypted and ("EOF occurred" in text or "reset by peer" in text):
            return "it closed the connection, as a scheduler that does not accept the certificate does"
        if isinstance(cause, ssl.SSLError):
            return f"TLS says {_reason(cause)}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or error)
