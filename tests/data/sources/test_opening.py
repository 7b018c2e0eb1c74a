"""Files behind URLs are read like those here; nothing of a URL's credentials is shown; no link
leads out of a directory of data.
"""

import gzip
import io
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pyarrow.parquet
import pytest

from jaxtune.config.schema import DataSection, DataSource
from jaxtune.core.errors import UserError
from jaxtune.core.text import without_credentials
from jaxtune.data.prepare import prepare
from jaxtune.data.sources.row import RowError
from jaxtune.data.sources.source import TRAIN, open_source
from tests.support import tools

ROWS = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet():
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


FILES = {
    "/rows.jsonl": LINES,
    "/rows.jsonl.gz": gzip.compress(LINES),
    "/rows.json": json.dumps(ROWS).encode(),
    "/rows.csv": b"prompt,completion\n" + b"".join(b"q %d,a %d\n" % (n, n) for n in range(5)),
    "/rows.parquet": parquet(),
    "/bad.jsonl": b'{"prompt": \n',
}


class Server(BaseHTTPRequestHandler):
    """Serves FILES where the query has the token; ranges and tags unless the path begins /plain."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        plain = path.startswith("/plain")
        data = FILES.get(path.removeprefix("/plain"))
        status, begin, end = 200, 0, len(data or b"")
        if data is None or "token=s3cret" not in query:
            status, data, end = 404, b"", 0
        elif (range_ := self.headers.get("Range")) and not plain:
            first, _, last = range_.removeprefix("bytes=").partition("-")
            status, begin, end = 206, int(first), min(int(last or end) + 1, end)
        self.send_response(status)
        self.send_header("Content-Length", str(end - begin))
        if not plain:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{hash(data)}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[begin:end])


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(source, **settings):
    return list(open_source(DataSource(source=str(source), **settings), TRAIN).rows())


@pytest.mark.parametrize("kind", ["", "/plain"])
@pytest.mark.parametrize("name", [name for name in FILES if "bad" not in name])
def test_files_of_a_web_server(name, kind, address):
    rows = read(f"{address}{kind}{name}?download=true&token=s3cret")
    assert [row.value for row in rows] == ROWS
    assert rows[0].location.file == f"{address}{kind}{name}?download=***&token=***"


def test_rows_behind_a_url_are_read_again_where_they_may_have_changed(address):
    url = f"{address}/rows.jsonl?token=s3cret"
    source = open_source(DataSource(source=url), TRAIN)
    assert source.identity() == source.identity()
    assert (
        open_source(DataSource(source=url.replace("/rows", "/plain/rows")), TRAIN).identity()
        is None
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows.json"])
def test_files_of_any_file_system(name):
    import fsspec

    fsspec.filesystem("memory").pipe(f"/urls/{name}", FILES[f"/{name}"])
    assert [row.value for row in read(f"memory://urls/{name}")] == ROWS


def test_no_message_and_no_record_shows_credentials(address):
    secret = address.replace("//", "//user:passw0rd@")
    for path in ("/none.jsonl?token=s3cret", "/rows.jsonl?X-Amz-Signature=s3cret", "/x.exe?s3cret"):
        with pytest.raises(UserError) as error:
            read(secret + path)
        assert "passw0rd" not in str(error.value)
        assert "s3cret" not in str(error.value)
        assert "127.0.0.1" in str(error.value)
    (row,) = read(f"{address}/bad.jsonl?token=s3cret")
    assert isinstance(row, RowError)
    assert "s3cret" not in str(row)
    data = DataSection(train=f"{address}/rows.jsonl?token=s3cret", max_length=64)
    examples = prepare(data, tools.byte_tokenizer(None, "</s>"))
    assert len(examples.items) == 5
    assert "s3cret" not in examples.source
    assert "rows.jsonl" in examples.source


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@h/a/b.jsonl", "https://***@h/a/b.jsonl"),
        ("see s3://b/k?X-Amz-Signature=a%2Fb&x=1#t", "see s3://b/k?X-Amz-Signature=***&x=***#***"),
        ("https://h/a?abc: no", "https://h/a?*** no"),
        ("https://h/a.csv: no", "https://h/a.csv: no"),
        ("a@b.c and /x?y=z", "a@b.c and /x?y=z"),
        ("'gs://b/f' \"http://t@h\"", "'gs://b/f' \"http://***@h\""),
    ],
)
def test_what_is_hidden_of_a_url(text, shown):
    assert without_credentials(text) == shown


def test_no_link_leads_out_of_a_directory(tmp_path):
    """Into the blobs of the hub's cache it may."""
    outside = tmp_path / "id_rsa"
    outside.write_bytes(LINES)
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "sub" / "b.jsonl").symlink_to("../a.jsonl")
    assert len(read(folder)) == 10
    link = folder / "c.jsonl"
    link.symlink_to(outside)
    for source in (folder, folder / "*.jsonl", folder / "**" / "*"):
        with pytest.raises(UserError, match=r"c.jsonl is a link that leads out of the directory"):
            read(source)
    assert len(read(link)) == 5  # named by the user
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(UserError, match="is a pipe"):
        read(folder)
    snapshot = tmp_path / "datasets--org--set" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "123").write_bytes(LINES)
    (snapshot / "a.jsonl").symlink_to("../../blobs/123")
    assert len(read(snapshot)) == 5
