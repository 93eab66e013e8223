"""What Python runs in a server's process: a module of vLLM's, with two things seen to.

    python qsun/vllm_process.py PARENT MODULE [ARGUMENTS]

It runs in the serving environment, which has no qsun: it imports nothing of it. vLLM's own engine
processes run this file again, before anything of theirs.

NIXL's progress thread looks for news without ever resting, and takes a whole core in every worker.
NIXL has a setting for a pause between looks; its Python interface sets that to none. NIXL is so
loaded before vLLM limits what UCX keeps registered, which has to be done first: it is done here.

When PARENT, the process that started this one, is gone, this one ends, and its process group, of
which it must be the leader. A signal at the parent's death would not do: vLLM loses those that come
while it starts.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from importlib import import_module
from threading import Thread
from typing import Any

UCX_LIMIT = ("UCX_RCACHE_MAX_UNRELEASED", "1024")  # vLLM's own choice: without, UCX leaks
PAUSE_US = 100  # takes the thread from a whole core to 2 % of one; a transfer takes longer
LOOK_S, GRACE_S = 1.0, 5.0


def pause_progress_threads(pause_us: int) -> None:
    """Have NIXL's progress threads rest between looks, from here on in this process."""
    os.environ.setdefault(*UCX_LIMIT)
    try:
        agent = import_module("nixl._api").nixl_agent
    except ImportError:
        return  # a server without a connector needs none
    bindings = import_module(agent.__module__).nixlBind
    make_agent = bindings.nixlAgent

    def paused_agent(name: str, config: Any) -> Any:
        config.pthrDelay = pause_us
        return make_agent(name, config)

    bindings.nixlAgent = paused_agent


def end_with(parent: int) -> None:
    """End this process group soon after `parent` is gone, by a signal that can be handled first."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)


pause_progress_threads(PAUSE_US)
if __name__ == "__main__":
    Thread(target=end_with, args=(int(sys.argv.pop(1)),), daemon=True).start()
    runpy.run_module(sys.argv.pop(1), run_name="__main__")
