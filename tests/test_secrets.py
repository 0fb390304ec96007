"""Canary secrets, really used by a run: none is in anything that the run leaves behind.

Searched are the bytes of all files: Prefect's database with its logs and results, the store, the
run directory, the copies in the bucket; and all that was printed, tracebacks too.
"""

# ruff: noqa: F811  (imported fixtures)
import os
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import LogSort

from ditty.config.spec import RunSpec
from ditty.config.specfile import parse_spec
from ditty.errors import RemoteError, SpecError
from ditty.runs.rundir import RunDir
from flows.finetune import finetune
from tests.remotes import bucket, moto_url, s3_env  # noqa: F401
from tests.served import tiny_spec

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYINTHEMINE",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-secret-0123456789",
    "AWS_SESSION_TOKEN": "canary-aws-session-0123456789",
    "HF_TOKEN": "hf_canaryCanaryCanary0123456789",
    "PREFECT_API_KEY": "pnu_canary0123456789",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://u:canary-db-password@127.0.0.1/x",
    "MY_PASSWORD": "canary-named-in-the-spec",
}
CANARIES = ["canary-db-password", *(s for s in SECRETS.values() if "://" not in s)]


def found_in(root: Path) -> list[str]:
    """Where below `root` a canary is, as `file: canary`."""
    return [
        f"{path}: {canary}"
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
        for canary in CANARIES
        if canary.encode() in path.read_bytes()
    ]


def wait_until_logged(text: str) -> None:
    """Until Prefect's server has written that line: it hears of logs a little later."""
    end = time.monotonic() + 30
    with get_client(sync_client=True) as client:
        while True:
            newest = client.read_logs(limit=200, sort=LogSort.TIMESTAMP_DESC)
            if any(text in entry.message for entry in newest):
                return
            assert time.monotonic() < end, f"{text!r} is in no log"
            time.sleep(0.2)


def test_no_secret_is_left_anywhere(
    tmp_path: Path,
    home: Path,
    prefect_api: str,
    bucket: Any,
    s3_env: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in SECRETS.items():
        s3_env.setenv(name, value)
    values = tiny_spec(tmp_path, "secretive", 2)
    values["upload"] = {"url": f"s3://{bucket.name}/x"}
    values["launch"]["environment"] = ["MY_PASSWORD"]
    finetune(RunSpec.model_validate(values))

    s3_env.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    values["name"] = "unreachable"
    with pytest.raises(RemoteError) as caught:
        finetune(RunSpec.model_validate(values))
    said = "".join(traceback.format_exception(caught.value))
    assert "127.0.0.1:9" in said
    wait_until_logged("127.0.0.1:9")

    (attempt,) = RunDir.named("secretive", home).attempts("train")
    assert "MY_PASSWORD" in (attempt / "launch.json").read_text(), "it was given to the training"
    database = Path(os.environ["PREFECT_HOME"]) / "prefect.db"
    written = b"".join(p.read_bytes() for p in database.parent.glob(f"{database.name}*"))
    assert b"secretive" in written and b"127.0.0.1:9" in written, "this is the database"
    objects = {o.key: o.get()["Body"].read() for o in bucket.objects.all()}
    assert any(key.endswith("adapter_model.safetensors") for key in objects)

    assert found_in(home) + found_in(database.parent) == []
    printed = said + "".join(capfd.readouterr())
    everything = [
        *objects.values(),
        *(str(o.meta.data).encode() for o in map(bucket.Object, objects)),
    ]
    everything.append(printed.encode())
    assert [c for c in CANARIES for text in everything if c.encode() in text] == []


@pytest.mark.parametrize("url", ["s3://key:canary-aws@bucket/x", "https://u:canary-aws@host"])
def test_a_password_in_a_spec_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    values = tiny_spec(tmp_path, "x", 1)
    values["upload"] = {"url": url}
    with pytest.raises(SpecError, match=r"is no target") as caught:
        parse_spec(values)
    with pytest.raises(ValueError, match=r"is no target") as by_prefect:
        RunSpec.model_validate(values)
    for error in (caught.value, by_prefect.value):
        assert "canary" not in "".join(traceback.format_exception(error))
