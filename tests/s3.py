"""A server of S3 in this process."""

import contextlib

import pytest

BUCKET = "restuning-tests"


@contextlib.contextmanager
def serving(monkeypatch):
    """A bucket of an S3 server that every client of this process and of those it starts asks; gives its client."""
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server").ThreadedMotoServer
    import boto3
    import fsspec

    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    try:
        yield client
    finally:
        # What was listed of it is nobody's to remember.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.stop()


def put(client, folder, prefix):
    """Every file of a folder, below a prefix; gives its URL."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            key = f"{prefix}/{file.relative_to(folder).as_posix()}"
            client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())
    return f"s3://{BUCKET}/{prefix}"
