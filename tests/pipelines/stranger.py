"""What a stranger on this machine can try: run by itself, as root it turns into nobody first.

Reads `{"ports": […], "requests": [[method, path, body], …], "certificate": path}` and prints, as JSON, what
each port answered to whom: `[port, manner, request, answer]`, without the ports that hung up.
"""

import encodings.idna  # noqa: F401  (nobody may not read where Python lies)
import itertools
import json
import os
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor

NOBODY = 65534
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # preface, empty SETTINGS
FOREIGN = {
    "Host": "evil.example",
    "Origin": "http://evil.example",
    "X-Forwarded-For": "127.0.0.1",
    "Authorization": "Basic bGF0ZW50LWdwdDpsYXRlbnQtZ3B0",
}
MANNERS = ("plain", "foreign", "tls", "certificate")


def asked(port: int, manner: str, message: bytes, protocol: str, certificate: str) -> bytes:
    """The first bytes of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        if manner in ("plain", "foreign"):
            return exchange(plain, message)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([protocol])
        if manner == "certificate":
            context.load_cert_chain(certificate)
        with context.wrap_socket(plain) as secured:
            return exchange(secured, message)


def exchange(connection: socket.socket, message: bytes) -> bytes:
    connection.sendall(message)
    return connection.recv(300)


def request(method: str, path: str, body: str, headers: dict[str, str]) -> bytes:
    headers = {"Host": "127.0.0.1", **headers, "Content-Length": str(len(body)), "Connection": "close"}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", body]).encode()


def tried(port: int, manner: str, what: list[str], certificate: str) -> list[object]:
    if what == ["gRPC"]:
        message, protocol = HTTP2, "h2"
    else:
        message = request(*what, FOREIGN if manner == "foreign" else {})
        protocol = "http/1.1"
    try:
        answer = asked(port, manner, message, protocol, certificate)
    except OSError:
        answer = b""
    return [port, manner, " ".join(what), answer.decode("latin-1")]


def main() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    task = json.load(sys.stdin)
    all_of_it = itertools.product(task["ports"], MANNERS, [*task["requests"], ["gRPC"]])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: tried(*one, task["certificate"]), all_of_it))
    json.dump([one for one in answers if one[-1]], sys.stdout)


if __name__ == "__main__":
    main()
