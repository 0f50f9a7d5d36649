"""Check that the Hugging Face hub can be reached, and load from its cache alone if it cannot."""

from __future__ import annotations

import logging
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Fault = Callable[[], str | None]  # why the Hugging Face hub cannot be reached, or None


def hub_fault(session: Any = None, pause_s: float = 1.0) -> str | None:
    """Return why the Hugging Face hub cannot be reached, or None if it can.

    The hub's own client retries every file for a minute. Here, a slow answer counts as an answer:
    the hub is out of reach only if connecting fails twice, or exceeds the hub's time limit.

    Args:
        session: an HTTP client; by default the hub's own.
        pause_s: seconds between the two attempts.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    session = session or get_session()
    for last in (False, True):
        try:
            session.head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return None
        except Exception as error:  # of whichever HTTP library the hub uses
            kinds = {kind.__name__ for kind in type(error).__mro__}
            if not kinds & {"ConnectError", "ConnectTimeout", "ProxyError"}:
                return None
            if last or "ConnectTimeout" in kinds:
                proxies = [key for key in urllib.request.getproxies() if key in ("https", "all")]
                through = f" through the proxy of {proxies[0].upper()}_PROXY" if proxies else ""
                host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
                return f"{host} cannot be reached{through} ({str(error) or type(error).__name__})"
        time.sleep(pause_s)
    return None


def planning() -> str:
    """Return why a plan does not reach the hub."""
    return "nothing is downloaded for a plan"


@contextmanager
def offline(wanted: bool = True) -> Iterator[None]:
    """Make the hub's client use its cache alone, without waiting for the network, if `wanted`."""
    from huggingface_hub import constants

    was = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the loggers of open_clip (the root), transformers and the hub.

    They also raise what they log.
    """
    loggers = [logging.getLogger(name) for name in (None, "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
