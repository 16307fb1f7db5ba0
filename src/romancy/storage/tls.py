"""TLS options of a MySQL address, in the one form that both of its drivers understand.

PostgreSQL's driver reads its own (``sslmode``, ``sslrootcert`` …) from the address.
"""

from __future__ import annotations

import ssl
from typing import Final

from sqlalchemy import URL

from romancy.errors import DatabaseURLError

_TEXTS: Final = ("ssl_ca", "ssl_capath", "ssl_cert", "ssl_key", "ssl_cipher")
_SWITCHES: Final = ("ssl_verify_cert", "ssl_verify_identity", "ssl_disabled", "ssl_check_hostname")
_WORDS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def without_tls(url: URL) -> URL:
    """The address without its TLS options."""
    return url.difference_update_query([name for name in url.query if name.startswith("ssl")])


def refuses_tls(url: URL) -> bool:
    """Whether the address says ``ssl_disabled=true``.

    Raises:
        DatabaseURLError: it says other things about TLS beside that.
    """
    given = {name: _one(name, value) for name, value in url.query.items() if name.startswith("ssl")}
    if not _switch(given, "ssl_disabled", False):
        return False
    if len(given) > 1:
        raise DatabaseURLError("ssl_disabled=true goes with no other option of TLS: leave them out")
    return True


def tls_context(url: URL) -> ssl.SSLContext | None:
    """What the address says about TLS; ``None`` where it says nothing.

    The server's certificate is checked where a CA is named, or ``ssl_verify_cert`` is true (then against the CAs of
    the system); and with it the name in it, unless ``ssl_verify_identity`` is false.

    Raises:
        DatabaseURLError: an option is unknown or has a wrong value, or a file can't be read.
    """
    given = {name: _one(name, value) for name, value in url.query.items() if name.startswith("ssl")}
    if not given or refuses_tls(url):
        return None
    for name in given:
        if name not in _TEXTS and name not in _SWITCHES:
            raise DatabaseURLError(
                f"{name} is no option of a mysql:// address: TLS takes {', '.join(_TEXTS + _SWITCHES[:3])}"
            )
    ca, capath = given.get("ssl_ca"), given.get("ssl_capath")
    checks_name = _switch(given, "ssl_verify_identity", _switch(given, "ssl_check_hostname", None))
    checks = _switch(given, "ssl_verify_cert", bool(checks_name or ca or capath))
    if checks_name and not checks:
        raise DatabaseURLError("ssl_verify_identity without ssl_verify_cert checks nothing: leave out the latter")
    try:
        context = ssl.create_default_context(cafile=ca, capath=capath)
    except OSError as error:
        raise DatabaseURLError(f"ssl_ca={ca!r}, ssl_capath={capath!r} can't be read: {error}") from error
    # Servers make themselves certificates that this flag, newly on in Python 3.13, would refuse.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.check_hostname = bool(checks and checks_name is not False)
    context.verify_mode = ssl.CERT_REQUIRED if checks else ssl.CERT_NONE
    if "ssl_key" in given and "ssl_cert" not in given:
        raise DatabaseURLError("ssl_key is given without ssl_cert: give the client's certificate, too")
    if "ssl_cert" in given:
        try:
            context.load_cert_chain(given["ssl_cert"], given.get("ssl_key"))
        except OSError as error:
            raise DatabaseURLError(
                f"ssl_cert={given['ssl_cert']!r}, ssl_key={given.get('ssl_key')!r} can't be read: {error}"
            ) from error
    if "ssl_cipher" in given:
        try:
            context.set_ciphers(given["ssl_cipher"])
        except ssl.SSLError as error:
            raise DatabaseURLError(f"ssl_cipher={given['ssl_cipher']!r}: {error}") from error
    return context


def _one(name: str, value: str | tuple[str, ...]) -> str:
    if isinstance(value, str):
        return value
    raise DatabaseURLError(f"{name} is given {len(value)} times: give it once")


def _switch(given: dict[str, str], name: str, default: bool | None) -> bool | None:
    text = given.get(name)
    if text is None:
        return default
    value = _WORDS.get(text.lower())
    if value is None:
        raise DatabaseURLError(f"{name}={text!r}: give true or false")
    return value
