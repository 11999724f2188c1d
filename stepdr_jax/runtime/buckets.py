"""Objects in a bucket, gs:// or s3://, with the methods of a path that checkpoints need; through tensorstore.

A bucket has no directories and no rename; writing an object is atomic. Server and credentials come from the usual
environment variables:

    s3://   AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else AWS's chain of credentials; AWS_REGION or
            AWS_DEFAULT_REGION; AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL for a store that is not Amazon's
    gs://   GOOGLE_APPLICATION_CREDENTIALS, else the machine's own account; STORAGE_EMULATOR_HOST for another store

tensorstore retries requests that fail temporarily (5xx, throttled, no connection); after that `with_retries` does.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import tensorstore as ts

from stepdr_jax.errors import UserError

T = TypeVar("T")
RETRY_SECONDS = 600.0  # for how long a store may fail before the run gives up
TENSORSTORE_RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "8s"}  # of each request
# Prefixes of tensorstore's temporary errors. All others (no such bucket, permission denied) are final.
TEMPORARY = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL")


@dataclasses.dataclass(frozen=True)
class BucketPath:
    """An object, or a prefix of objects. `key` has no slash at either end and is "" for the bucket itself."""

    scheme: str
    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str) -> "BucketPath":
        """Raises UserError when `url` is not gs://BUCKET/PATH or s3://BUCKET/PATH."""
        match = re.fullmatch(r"(gs|s3)://([^/]+)((?:/+[^/]+)*)/*", url)
        if not match:
            raise UserError(f"expected a folder, gs://BUCKET/PATH or s3://BUCKET/PATH, got {url!r}")
        return cls(match[1], match[2], re.sub("/+", "/", match[3]).strip("/"))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "BucketPath":
        return dataclasses.replace(self, key=f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "BucketPath":
        return dataclasses.replace(self, key=self.key.rpartition("/")[0])

    def names(self) -> list[str]:
        """Names of all objects below, relative to this path, sorted. One request per thousand objects."""
        prefix = f"{self.key}/" if self.key else ""
        last = prefix[:-1] + chr(ord("/") + 1) if prefix else ""
        span = ts.KvStore.KeyRange(prefix, last)
        found = with_retries(self, lambda: self._store().list(span).result())
        return sorted(k.decode()[len(prefix) :] for k in found if k.decode().startswith(prefix))

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError."""
        result = with_retries(self, lambda: self._store().read(self.key).result())
        if result.state != "value":
            raise FileNotFoundError(f"{self} does not exist")
        return result.value

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Writes the object atomically."""
        with_retries(self, lambda: self._store().write(self.key, data).result())

    def remove(self) -> None:
        """Removes the object, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            with_retries(self, lambda: self._store().write(self.key, None).result())

    def kvstore(self) -> dict[str, Any]:
        """tensorstore's specification of everything below this path."""
        return _spec(self.scheme, self.bucket) | {"path": f"{self.key}/"}

    def _store(self) -> ts.KvStore:
        return _opened(json.dumps(_spec(self.scheme, self.bucket)))


@functools.cache
def _opened(spec: str) -> ts.KvStore:
    return ts.KvStore.open(json.loads(spec)).result()


def _spec(scheme: str, bucket: str) -> dict[str, Any]:
    environ = os.environ
    if scheme == "gs":
        if host := environ.get("STORAGE_EMULATOR_HOST"):
            environ["TENSORSTORE_GCS_HTTP_URL"] = host if "://" in host else f"http://{host}"
        return {"driver": "gcs", "bucket": bucket, "context": {"gcs_request_retries": TENSORSTORE_RETRIES}}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "context": {"s3_request_retries": TENSORSTORE_RETRIES}}
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in environ:  # the default chain warns of every other source that it did not find
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def with_retries(
    where: object,
    request: Callable[[], T],
    refused: str = "the store refuses ({}); check the bucket's name, region and credentials",
) -> T:
    """Returns `request()`, repeated for up to RETRY_SECONDS while the store fails temporarily.

    Args:
        where: names the object in messages.
        refused: message for a final error, which takes the place of {}.

    Raises:
        UserError: a final error, or temporary errors for too long.
    """
    deadline, pause = time.monotonic() + RETRY_SECONDS, 1.0
    while True:
        try:
            return request()
        except (ValueError, RuntimeError, OSError) as error:  # tensorstore has no error type of its own
            line = (str(error) or type(error).__name__).splitlines()[0][:300]
            if not line.startswith(TEMPORARY):
                raise UserError(f"{where}: {refused.format(line)}") from error
            left = deadline - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"{where}: the store has failed for {RETRY_SECONDS:.0f} seconds ({line}); when it is back, run the "
                    "same command: it continues from the last whole checkpoint"
                ) from error
            print(f"{where}: {line}; trying again for {left:.0f} more seconds", file=sys.stderr, flush=True)
            time.sleep(min(pause, left))
            pause = min(2 * pause, 30.0)
