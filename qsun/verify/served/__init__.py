"""The served level: vLLM's own processes over NIXL, beside the same modules in this process."""
