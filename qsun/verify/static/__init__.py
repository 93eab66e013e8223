"""The static level: headers, configs, tokenizers, records and digests, without weights."""
