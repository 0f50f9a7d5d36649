"""moto's S3 server on loopback, with faults in front of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import optional
import pytest

optional.require("moto", "obstore")
logging.getLogger("werkzeug").setLevel(logging.ERROR)
BUCKET = "bucket"
Fault = Callable[[str, str], str | None]  # (method, path) -> the fault, or None


@dataclass
class FakeS3:
    """An S3 server; `fault` chooses for each request: fail, slow, cut (the body), flip (a byte)."""

    url: str = ""
    fault: Fault | None = None
    asked: list[str] = field(default_factory=list)
    faults: int = 0
    slow_s: float = 1.0

    def __post_init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.asked.append(f"{method} {path}")
        wrong = self.fault(method, path) if self.fault else None
        self.faults += wrong is not None
        if wrong == "slow":
            time.sleep(self.slow_s)
        if wrong == "fail":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Service Unavailable", [("Content-Length", "0")])
            return []
        body = b"".join(self._moto(environ, start))
        if wrong == "cut" and method == "GET":
            return [body[: len(body) // 2]]  # of the length that was announced
        if wrong == "flip" and method == "GET" and "HTTP_RANGE" not in environ:
            return [body[:-1] + bytes([body[-1] ^ 1])]
        return [body]

    def got(self, part: str) -> list[str]:
        """Return the GET requests whose path contains a text."""
        return [line for line in self.asked if line.startswith("GET") and part in line]


@contextmanager
def serving(patch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    """Serve an empty bucket, and name the server in the environment, until the block ends."""
    import boto3
    from werkzeug.serving import make_server

    server = FakeS3()
    http = make_server("127.0.0.1", 0, server, threaded=True)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=BUCKET)
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
