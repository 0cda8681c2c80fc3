"""Numbers for Prometheus, read by its own parser."""

from __future__ import annotations

import math
import socket
import urllib.request
from urllib.error import HTTPError

import pytest

from hpc_supcon.config import load_config
from hpc_supcon.training.metrics import MetricLog
from hpc_supcon.training.metrics_endpoint import MetricsEndpoint
from tests.loaders.extras import require

require("prometheus_client", "pip install prometheus-client", "the endpoint")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

RUN = 'a "run" \\ of\nmine'


@pytest.fixture
def endpoint():
    endpoint = MetricsEndpoint(0, {"run": RUN}, pytest.fail)
    yield endpoint
    endpoint.close()


def read(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def gauges(url):
    families = list(text_string_to_metric_families(read(url)))
    assert {family.type for family in families} <= {"gauge"}
    return {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}


def test_the_newest_numbers_of_each_event_are_gauges_of_the_run(endpoint):
    assert gauges(endpoint.url) == {}
    endpoint.write("train", 10, {"event": "train", "loss": 2.0, "images_per_s": 512.0, "lr": 1e-7, "epoch": 0})
    endpoint.write("train", 20, {"event": "train", "loss": 1.5, "images_per_s": 256.0, "lr": 1e-5, "epoch": 1})
    endpoint.write("probe/linear", 5, {"validation_loss": math.inf, "accuracy": math.nan, "flag": True, "text": "x"})
    found = gauges(endpoint.url)
    assert all(labels == {"run": RUN} for labels, _ in found.values())
    numbers = {name.removeprefix("hpc_supcon_"): value for name, (_, value) in found.items()}
    assert math.isnan(numbers.pop("probe_linear_accuracy"))
    assert numbers.pop("train_time_seconds") > 1e9
    del numbers["probe_linear_time_seconds"]
    assert numbers == {
        "train_step": 20.0, "train_loss": 1.5, "train_images_per_s": 256.0, "train_lr": 1e-5, "train_epoch": 1.0,
        "probe_linear_step": 5.0, "probe_linear_validation_loss": math.inf,
    }  # fmt: skip


def test_only_metrics_are_served_and_only_to_this_machine(endpoint):
    with pytest.raises(HTTPError, match="404") as refused:
        urllib.request.urlopen(endpoint.url.removesuffix("/metrics") + "/../etc/passwd", timeout=60)
    refused.value.close()
    assert endpoint._server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_told_in_a_line_and_the_run_goes_on(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        settings = load_config("default", ["log.to=[]", f"log.metrics_port={port}"]).log
        with MetricLog(tmp_path, settings) as log:
            log.log("train", 1, loss=1.0)
    assert capsys.readouterr().err == (
        f"log.metrics_port={port}: nothing is served: Address already in use; the run goes on\n"
    )


def test_a_run_says_where_it_listens_and_frees_its_port(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = load_config("default", ["log.to=[]", f"log.metrics_port={port}"]).log
    for step in (1, 2):  # two stages
        with MetricLog(tmp_path, settings) as log:
            log.log("train", step, loss=0.5)
            url = f"http://127.0.0.1:{port}/metrics"
            assert gauges(url)["hpc_supcon_train_step"] == ({"run": tmp_path.name}, float(step))
    assert capsys.readouterr().err == f"metrics: {url}\n" * 2
