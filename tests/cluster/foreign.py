"""What a foreign pod finds: it has no label of ours, no credentials, and tries all the same.

    python -c "<this text>" S3 MLFLOW

Both are addresses of pods. Prints what happened as JSON. It is handed over as text, as no image holds tests.
"""

import base64
import json
import re
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request

PORTS = (5000, 8333, 18333, 8080, 18080, 8888, 18888, 9333, 19333, 23646, 33646)
S3, MLFLOW = sys.argv[1:]


def asked(url, method="GET", data=None, **headers):
    """The status of an answer."""
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def is_open(host, port):
    try:
        socket.create_connection((host, port), 3).close()
        return True
    except OSError:
        return False


def control(context=None):
    """What the control port of S3 says to a client of HTTP/2."""
    try:
        connection = socket.create_connection((S3, 18333), 5)
        connection.settimeout(5)
        if context:
            context.set_alpn_protocols(["h2"])
            connection = context.wrap_socket(connection)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        return connection.recv(100).hex()
    except OSError as error:
        return type(error).__name__


def with_a_certificate_of_its_own():
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=latent-gpt -keyout /tmp/key -out /tmp/crt"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl._create_unverified_context()
    context.load_cert_chain("/tmp/crt", "/tmp/key")
    return context


def routes():
    """All paths of MLflow's server with a method, as its own code has them; what is variable is 1."""
    from mlflow.server import app
    from mlflow.server.fastapi_app import app as asgi

    found = set()
    for rule in app.url_map.iter_rules():
        found |= {(method, re.sub(r"<[^>]*>", "1", rule.rule)) for method in rule.methods}
    for route in asgi.routes:
        for method in getattr(route, "methods", None) or ():
            found.add((method, re.sub(r"{[^}]*}", "1", route.path)))
    return sorted(one for one in found if one[0] not in ("OPTIONS", "HEAD"))


def login(password):
    return {"Authorization": "Basic " + base64.b64encode(f"latent-gpt:{password}".encode()).decode()}


named = {"Host": "latent-gpt-mlflow:5000"}
search = f"http://{MLFLOW}:5000/api/2.0/mlflow/experiments/search?max_results=1"
print(
    json.dumps(
        {
            "open at S3": [port for port in PORTS if is_open(S3, port)],
            "open at MLflow": [port for port in PORTS if is_open(MLFLOW, port)],
            "list": asked(f"http://{S3}:8333/"),
            "read": asked(f"http://{S3}:8333/latent-gpt"),
            "write": asked(f"http://{S3}:8333/latent-gpt/mine", "PUT", b"mine"),
            "control": control(),
            "control by TLS": control(ssl._create_unverified_context()),
            "control with a certificate": control(with_a_certificate_of_its_own()),
            "MLflow": asked(search, **named),
            "MLflow with a password": asked(search, **named, **login("password1234")),
            "MLflow by another name": asked(search, Host="elsewhere"),
            "MLflow's routes": [
                (method, path, asked(f"http://{MLFLOW}:5000{path}", method, None, **named))
                for method, path in routes()
            ],
        }
    )
)
