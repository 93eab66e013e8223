"""What Python runs in a server's process: a module of vLLM's, with NIXL made to pause.

    python qsun/vllm_process.py MODULE [ARGUMENTS]

It runs in the serving environment, which has no qsun: it imports nothing of it. vLLM's own engine
processes run this file again, before anything of theirs.

NIXL's progress thread looks for news without ever resting, and takes a whole core in every worker.
NIXL has a setting for a pause between looks; its Python interface sets that to none.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from typing import Any

PAUSE_US = 100  # takes the thread from a whole core to 2 % of one; a transfer takes longer


def pause_progress_threads(pause_us: int) -> None:
    """Have NIXL's progress threads rest between looks, from here on in this process."""
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


pause_progress_threads(PAUSE_US)
if __name__ == "__main__":
    runpy.run_module(sys.argv.pop(1), run_name="__main__")
