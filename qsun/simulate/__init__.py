"""A simulated cluster: prefill and decode workers whose times are measured curves."""
