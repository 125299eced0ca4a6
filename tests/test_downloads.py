"""Downloads: checked, resumed, timed, forbidden; and none at import or in a constructor."""

import gzip
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import downloads
import pandas as pd
import pytest
import requests
import tasks
from downloads import OFFLINE, TIMEOUT, ensure_dataset, fetch
from targets import wetlab_targets

from polysrl_dc.errors import InvalidInputError

ROOT = Path(__file__).resolve().parents[1]
CONTENT = gzip.compress(json.dumps({"columns": ["a"], "index": [0], "data": [[1]]}).encode()) * 999
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; ``cut`` ends the connection early, ``content`` is something else."""

    cut: int | None = None
    content = CONTENT
    ranges = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str | None] = []
        self.release = threading.Event()
        self.silent = False


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if server.silent:
            server.release.wait(30)
            return
        start = int(wanted[6:-1]) if wanted and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start : server.cut])

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    served = Server()
    thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield served
    served.release.set()
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.fixture
def dataset(server, tmp_path, monkeypatch):
    """A data set of matminer that lies on the server; the file it is kept in."""
    url = f"http://127.0.0.1:{server.server_port}/x"
    described = {"url": url, "hash": DIGEST, "file_type": "json.gz"}
    monkeypatch.setattr(downloads.datasets, "get_dataset_attribute", lambda name, k: described[k])
    monkeypatch.setenv("MATMINER_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "some.json.gz"


def test_a_file_is_downloaded_once(server, dataset):
    assert ensure_dataset("some") == ensure_dataset("some") == dataset
    assert dataset.read_bytes() == CONTENT and server.asked == [None]
    assert not list(dataset.parent.glob("*.part"))


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server, dataset, ranges):
    server.cut, server.ranges = 50_000, ranges
    with pytest.raises(requests.RequestException):
        ensure_dataset("some")
    part = dataset.with_name("some.json.gz.part")
    kept = len(part.read_bytes())
    assert 40_000 < kept <= 50_000 and part.read_bytes() == CONTENT[:kept]
    assert not dataset.exists()
    server.cut = None
    ensure_dataset("some")
    assert dataset.read_bytes() == CONTENT and server.asked == [None, f"bytes={kept}-"]
    dataset.rename(part)  # killed between the last byte and the name
    ensure_dataset("some")
    assert dataset.read_bytes() == CONTENT and not part.exists()


def test_another_content_is_refused_and_not_kept(server, dataset):
    server.content = b"<html>not found</html>"
    with pytest.raises(InvalidInputError, match=f"/x sends has not the SHA-256 {DIGEST}"):
        ensure_dataset("some")
    assert [path.name for path in dataset.parent.iterdir()] == [".lock"]
    server.content = CONTENT
    ensure_dataset("some")
    dataset.write_bytes(CONTENT[:-1])  # as a download of matminer's own can leave it
    with pytest.raises(InvalidInputError, match=r"some\.json\.gz has not the SHA-256"):
        ensure_dataset("some")


def test_a_silent_server_does_not_hold_the_run(server, dataset, monkeypatch):
    assert all(0 < seconds <= 60 for seconds in TIMEOUT)
    monkeypatch.setattr(downloads, "TIMEOUT", (0.2, 0.2))
    server.silent = True
    with pytest.raises(requests.Timeout):
        ensure_dataset("some")


def test_offline_is_one_clear_line(server, dataset, monkeypatch):
    monkeypatch.setenv(OFFLINE, "1")
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    for load in (lambda: tasks.load_task("steels"), lambda: wetlab_targets(None)):
        with pytest.raises(tasks.DataNotFoundError) as caught:
            load()
        assert f"missing and {OFFLINE} is set" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert server.asked == []
    dataset.parent.mkdir()
    dataset.write_bytes(CONTENT)
    assert ensure_dataset("some") == dataset  # what is there can be used


def test_a_wrong_checksum_is_no_missing_file(server, dataset, monkeypatch):
    monkeypatch.delenv("POLYSRL_DATA", raising=False)
    server.content = b"something else"
    with pytest.raises(InvalidInputError, match="SHA-256"):
        tasks.load_task("steels")
    with pytest.raises(InvalidInputError, match="SHA-256"):
        wetlab_targets(None)


def test_tables_come_from_the_checked_file(monkeypatch):
    order = []

    def table(name, **settings):
        order.append((name, settings))
        return pd.DataFrame({"composition": ["FeC"], "yield strength": [1.0]})

    monkeypatch.setattr(downloads, "ensure_dataset", lambda name: order.append(name))
    monkeypatch.setattr(downloads.matbench.data_ops, "load_dataset", table)
    monkeypatch.setattr(downloads.datasets, "load_dataset", table)
    downloads.load_dataset("expt_gap")
    assert downloads.load_official("matbench_steels").index.tolist() == ["mb-steels-1"]
    assert order == [
        "expt_gap",
        ("expt_gap", {"download_if_missing": False}),
        "matbench_steels",
        ("matbench_steels", {}),
    ]


def test_fetch_needs_no_cache_folder_of_matminer(server, tmp_path):
    fetch(f"http://127.0.0.1:{server.server_port}/x", tmp_path / "y", DIGEST)
    assert (tmp_path / "y").read_bytes() == CONTENT


NO_NETWORK = """
import importlib, socket, sys
from pathlib import Path

def refuse(*arguments, **keywords):
    raise SystemExit(f"a connection: {arguments[1:]}")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
root = Path(sys.argv[1])
sys.path[:0] = [str(root), str(root / "benchmarks")]
for folder in ("polysrl_dc", "benchmarks"):
    for path in sorted((root / folder).glob("*.py")):
        package = "polysrl_dc." if folder == "polysrl_dc" else ""
        importlib.import_module(package + path.stem)
import deepchem as dc, polysrl_dc, tasks
for model in ({}, {"task": "pretraining"}, {"pretrained": None, "n_ensemble": 2}):
    dc.models.PolySRLModel(**model)
polysrl_dc.PolySRLModel.from_pretrained("polysrl-mp")
dc.feat.StoichiometryGraphFeaturizer(), dc.feat.StructureGraphFeaturizer()
dc.splits.StoichiometrySplitter(), polysrl_dc.PolySRLConfig.named("paper")
tasks.MatbenchTask("matbench_steels", autoload=False)
print("no connection")
"""


def test_nothing_is_downloaded_at_import_or_in_a_constructor():
    result = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, ROOT], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.strip().endswith("no connection"), result.stderr[-2000:]
