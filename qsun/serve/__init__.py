"""One shared pool of decode workers for many tasks: launch, router, policy."""
