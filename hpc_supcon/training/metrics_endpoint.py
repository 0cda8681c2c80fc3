"""The newest numbers of a run in Prometheus's text format, over HTTP, for the dashboards of a cluster."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

ADDRESS = "127.0.0.1"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsEndpoint:
    """Serves http://127.0.0.1:PORT/metrics from a thread; only this machine can read it.

    Every number of an event is a gauge, `hpc_supcon_EVENT_NAME`. A port that is in use is told; nothing is served.
    """

    def __init__(self, port: int, labels: Mapping[str, str], warn: Callable[[str], None]) -> None:
        """labels: of every gauge, such as the name of the run."""
        self._labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
        self._gauges: dict[str, float] = {}
        self._server: ThreadingHTTPServer | None = None
        try:
            self._server = ThreadingHTTPServer((ADDRESS, port), _handler(self._text))
        except OSError as error:
            warn(f"log.metrics_port={port}: nothing is served: {error.strerror}; the run goes on")
            return
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str | None:
        return None if self._server is None else f"http://{ADDRESS}:{self._server.server_port}/metrics"

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        found = {"step": step, "time_seconds": time.time(), **values}
        numbers = {
            f"{event}_{name}": float(value)
            for name, value in found.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        self._gauges = {**self._gauges, **numbers}  # a new one: another thread may be reading the old one

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def _text(self) -> bytes:
        gauges = dict(self._gauges)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            gauges["gpu_memory_allocated_bytes"] = torch.cuda.memory_allocated()
            gauges["gpu_memory_reserved_bytes"] = torch.cuda.memory_reserved()
        lines = []
        for name, value in gauges.items():
            metric = re.sub("[^a-zA-Z0-9_]", "_", f"hpc_supcon_{name}")
            text = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(repr(value), repr(value))
            lines += [f"# TYPE {metric} gauge", f"{metric}{{{self._labels}}} {text}"]
        return "".join(f"{line}\n" for line in lines).encode()


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _handler(text: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds for which a client may be silent

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            body = text()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Nothing: stderr is the run's."""

    return Handler
