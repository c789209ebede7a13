"""A real S3 server that holds a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def serving(folder: Path, secret: str = "secret") -> Iterator[None]:
    """Serve a folder as the bucket `text`; the environment names server and credentials."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    s3fs.S3FileSystem.clear_instance_cache()  # one of another test's server would be used again
    host, port = started.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="text")
        for file in folder.rglob("*.*"):
            client.upload_file(str(file), "text", str(file.relative_to(folder)))
        yield
    started.stop()
