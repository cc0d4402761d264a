"""Signed reports: OpenSSF model signing with a plain key, by the package `model-signing`. No network is used.

What is signed is report.json, of which the other files are renderings. It holds the digest of the model, so
that the signature covers both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doorward.core.errors import InputError, MissingExtra

#: The signature lies next to the file that it signs.
SUFFIX = ".sig"
_KEYS = "an elliptic-curve key (P-256, P-384 or P-521) in PEM, without a password"
_MAKE = "openssl ecparam -name prime256v1 -genkey -noout makes one"


def signature_of(report: Path) -> Path:
    """Return where the signature of a report.json lies."""
    return report.with_name(report.name + SUFFIX)


def signer(key: Path) -> Any:
    """Read a private key, before any work is spent on what it shall sign.

    Raises:
        InputError: if it cannot be used.
        MissingExtra: if the package that signs is missing.
    """
    try:
        from model_signing import signing
    except ImportError as error:
        raise _missing() from error
    try:
        return signing.Config().use_elliptic_key_signer(private_key=key)
    except OSError as error:
        raise InputError(f"--sign-key {key}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:  # the package meets other keys unprepared
        raise InputError(f"--sign-key {key}: a private key is needed, {_KEYS}; {_MAKE}") from error


def sign(report: Path, by: Any) -> Path:
    """Sign a report.json and return where the signature lies.

    Args:
        by: what `signer` returned.

    Raises:
        InputError: if the signature cannot be written.
    """
    place = signature_of(report)
    try:
        by.sign(report, place)
    except OSError as error:
        raise InputError(f"{place}: the signature cannot be written: {error.strerror}") from error
    return place


def unlike_signed(report: Path, key: Path) -> str | None:
    """Return what is wrong with a report's signature, None if it is this key's and the report is unchanged.

    Args:
        report: a report.json; the signature lies next to it.
        key: the public key.

    Raises:
        InputError: if there is no signature, or the report or the key cannot be used.
        MissingExtra: if the package that checks it is missing.
    """
    try:
        from model_signing import verifying
    except ImportError as error:
        raise _missing() from error
    place = signature_of(report)
    for path in (key, report, place):
        if not path.is_file():
            raise InputError(f"{path}: there is no such file; --key checks a report against {place.name}")
    try:
        check = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except OSError as error:
        raise InputError(f"--key {key}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"--key {key}: the public key is needed, {_KEYS}") from error
    try:
        check.verify(report, place)
    except OSError as error:
        raise InputError(f"{error.filename or report}: cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever a forged signature makes of the packages that read it
        return _why(error)
    return None


def _why(error: Exception) -> str:
    from cryptography.exceptions import InvalidSignature

    if isinstance(error, InvalidSignature) or "Key mismatch" in str(error):
        return "the signature was not made with this key"
    if "Signature mismatch" in str(error):
        return "the report was changed after it was signed"
    return "the signature cannot be read"


def _missing() -> MissingExtra:
    return MissingExtra("model-signing", "sign", "signing reports and checking signatures")
