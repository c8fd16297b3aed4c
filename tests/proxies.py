"""Proxies before the real servers, which answer as servers of other people do, or lie."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SKIPPED = ("transfer-encoding", "connection", "content-length", "date", "server")  # of an answer


@dataclass
class Answer:
    """What goes back to the client, whatever `headers["Content-Length"]` says of it."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    pause: float = 0.0  # seconds before each byte
    repeat: bool = False  # the body without an end, until the client has gone

    @classmethod
    def error(cls, status: int, code: str, message: str = "") -> Answer:
        """As S3 refuses."""
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        return cls(status, {"Content-Type": "application/xml"}, text.encode())


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    method: str
    path: str  # with the query, as it came
    headers: Any
    body: bytes

    @property
    def key(self) -> str:
        """Of the object, without its bucket."""
        return urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/").partition("/")[2]


class Server(http.server.ThreadingHTTPServer):
    """One whose clients may leave when they like."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Not worth a trace."""


Hook = Callable[[Request, Callable[[], Answer]], Answer]


@contextmanager
def proxy(upstream: str, hook: Hook, tls: Path | None = None) -> Iterator[str]:
    """A proxy on loopback; yields its URL.

    Args:
        upstream: URL of the real server.
        hook: gets the request and a function that asks the real server; returns the answer.
        tls: folder of `certificate`, for a proxy that speaks https.
    """
    host = urllib.parse.urlsplit(upstream).netloc

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def go(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, self.headers, body)
            answer = hook(request, lambda: self.ask(request))
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            with contextlib.suppress(OSError):  # the client has had enough
                self.send(answer)
            self.close_connection = len(answer.body) != int(
                answer.headers.get("Content-Length", len(answer.body))
            )

        def send(self, answer: Answer) -> None:
            while True:
                if answer.pause:
                    for byte in answer.body:
                        stop.wait(answer.pause)
                        self.wfile.write(bytes([byte]))
                else:
                    self.wfile.write(answer.body)
                if not answer.repeat or stop.is_set():
                    return

        def ask(self, request: Request) -> Answer:
            connection = http.client.HTTPConnection(host, timeout=60)
            dropped = ("transfer-encoding", "content-length", "expect", "connection")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            headers["Content-Length"] = str(len(request.body))
            connection.request(self.command, self.path, request.body, headers)
            found = connection.getresponse()
            kept = {name: value for name, value in found.getheaders() if name.lower() not in SKIPPED}
            if self.command == "HEAD":
                kept["Content-Length"] = found.getheader("Content-Length", "0")
            body = found.read()
            connection.close()
            return Answer(found.status, kept, body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = go

    stop = threading.Event()
    with Server(("127.0.0.1", 0), Handler) as server:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
        finally:
            stop.set()
            server.shutdown()


def certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that has signed itself; returns its file."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(private)
    (folder / "cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
    return folder / "cert.pem"
